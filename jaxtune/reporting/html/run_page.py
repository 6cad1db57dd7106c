"""The page of a run: curves, data, examples, answers, and how to repeat it.

A single file that opens from disk: style and script are inside, nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from jaxtune.html import resource
from jaxtune.reporting.files import RunFiles
from jaxtune.reporting.html.answers import answer_cards, samples
from jaxtune.reporting.html.curves import curves, evaluations, policy, script, written
from jaxtune.reporting.html.data_page import ExampleView
from jaxtune.reporting.html.data_tables import data_view
from jaxtune.reporting.html.evaluation import evaluation_tables
from jaxtune.reporting.html.markup import PACKAGE, Table, part, render

Row = Mapping[str, Any]


class RunPage(NamedTuple):
    """A run for its page.

    `data` is the data report, or a sentence that says why there is none; `evaluations` are
    (name, what `evaluate --json` printed).
    """

    run: RunFiles
    data: Row | str
    examples: Sequence[ExampleView]
    evaluations: Sequence[tuple[str, Row]]
    commands: Sequence[tuple[str, str]]  # (what it does, the command)
    written: str  # when, and by what


def run_page(page: RunPage) -> str:
    """Write the whole document."""
    code = script()
    return render(
        "run.html.jinja",
        title=page.run.folder.resolve().name,
        policy=policy(code),
        script=Markup(code),
        run_style=Markup(resource(PACKAGE, "report.css")),
        facts=_facts(page.run),
        notes=page.run.notes,
        sections=[
            (title, title.lower().replace(" ", "-"), body)
            for title, body in _sections(page)
            if body
        ],
        written=page.written,
    )


def _sections(page: RunPage) -> list[tuple[str, Markup]]:
    run, examples = page.run, page.examples
    scores = [evaluation_tables(*evaluation) for evaluation in page.evaluations]
    answers = [answer_cards(*evaluation) for evaluation in page.evaluations]
    report = page.data if isinstance(page.data, str) else data_view(page.data)
    return [
        ("Curves", curves(run.train, run.evals)),
        ("Evaluation", part("evaluated", scores, evaluations(run.evals), answers)),
        ("Samples", samples(run.samples)),
        ("Data", part("data_section", report)),
        ("Examples", part("examples", examples) if examples else Markup("")),
        ("How to repeat", _repeat(run, page.commands)),
    ]


def _facts(run: RunFiles) -> list[tuple[str, str, str]]:
    """Sum up how far the run came, and with what result, as (name, value, more)."""
    facts: list[tuple[str, str, str]] = []
    total = run.starts[-1].get("total_steps") if run.starts else None
    last = max((row["step"] for row in (*run.train, *run.evals)), default=0)
    facts.append(("step", f"{last:,}", f"of {total:,}" if isinstance(total, int) else ""))
    if run.train:
        first, row = run.train[0], run.train[-1]
        began = f"from {written(first['loss'], '.4g')}" if len(run.train) > 1 else ""
        facts.append(("training loss", written(row["loss"], ".4g"), began))
    if run.evals:
        best = min(run.evals, key=_loss)
        row = run.evals[-1]
        at = "the lowest" if row is best else f"lowest {_loss(best):.4g} at step {best['step']:,}"
        facts.append(
            ("evaluation loss", written(row["eval_loss"], ".4g"), at if len(run.evals) > 1 else "")
        )
        accuracy = row.get("eval_token_accuracy")
        if isinstance(accuracy, int | float):
            facts.append(("token accuracy", written(accuracy, ".1%"), "in evaluation"))
    if run.train:
        rates = sorted(
            rate
            for row in run.train
            if isinstance(rate := row.get("tokens_per_second"), int | float)
        )
        if rates:
            facts.append(("tokens a second", f"{rates[len(rates) // 2]:,.0f}", "median"))
        trained = run.train[-1].get("tokens_trained")
        if isinstance(trained, int):
            facts.append(("trained tokens", f"{trained:,}", ""))
    return facts


def _loss(row: Row) -> float:
    value = row["eval_loss"]
    return float("inf") if value is None or value != value else float(value)


def _repeat(run: RunFiles, commands: Sequence[tuple[str, str]]) -> Markup:
    starts = [
        (
            row["step"],
            str(row.get("time", "")).replace("T", " ").replace("+00:00", " UTC"),
            f"{row.get('devices', '?')} x {row.get('device', '?')}",
            row.get("hosts", ""),
            f"{row.get('system', '')}, {row.get('cores', '?')} cores",
        )
        for row in run.starts
    ]
    versions = list(run.starts[-1].get("versions", {}).items()) if run.starts else []
    caption = "Versions" + (" at the last start" if len(run.starts) > 1 else "")
    tables = [
        Table("Where it ran", ("from step", "time", "devices", "hosts", "system"), starts),
        Table(caption, ("", ""), versions),
    ]
    return part("repeat", commands, tables, run.config)
