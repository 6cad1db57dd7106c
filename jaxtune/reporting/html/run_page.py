"""The page of a run: curves, data, examples, answers, and how to repeat it.

One file that opens from disk: style and script are inside, nothing is loaded. Takes plain values.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtune.reporting.html.answers import answer_cards, samples
from jaxtune.reporting.html.curves import curves, evaluations, policy, script, written
from jaxtune.reporting.html.data_tables import data_tables, tiles
from jaxtune.reporting.html.evaluation import evaluation_tables
from jaxtune.reporting.html.example import KEY, ExampleView, example_card
from jaxtune.reporting.html.markup import STYLE, escaped, table

Row = Mapping[str, Any]


class RunPage(NamedTuple):
    """What the page shows. `data` is the data report, or a sentence that says why there is none;
    `evaluations` are (name, what `evaluate --json` printed)."""

    name: str
    train: Sequence[Row]
    evals: Sequence[Row]
    starts: Sequence[Row]
    samples: Sequence[Row]
    evaluations: Sequence[tuple[str, Row]]
    data: Row | str
    examples: Iterable[ExampleView]
    config: str | None
    commands: Sequence[tuple[str, str]]  # (what it does, the command)
    notes: Sequence[str]
    written: str  # when, and by what


def run_page(run: RunPage) -> str:
    """The whole document."""
    code = script()
    style = (
        importlib.resources.files("jaxtune.reporting.html")
        .joinpath("report.css")
        .read_text("utf-8")
    )
    sections = [(title, body) for title, body in _sections(run) if body]
    links = "".join(f'<a href="#{_id(title)}">{title}</a>' for title, _ in sections)
    bodies = "\n".join(
        f'<section id="{_id(title)}" aria-labelledby="{_id(title)}-title">'
        f'<h2 id="{_id(title)}-title">{title}</h2>\n{body}\n</section>'
        for title, body in sections
    )
    notes = "".join(f"<li>{escaped(note)}</li>" for note in run.notes)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{escaped(policy(code))}">
<title>{escaped(run.name)}</title>
<style>{STYLE}{style}</style>
</head>
<body class="run">
<a class="skip" href="#main">to the content</a>
<header>
<h1>{escaped(run.name)}</h1>
<dl class="facts">{_facts(run)}</dl>
{f'<ul class="notes">{notes}</ul>' if notes else ""}
</header>
<nav aria-label="Sections">{links}</nav>
<main id="main">
{bodies}
</main>
<footer><p>{escaped(run.written)}</p></footer>
<script>{code}</script>
</body>
</html>
"""


def _sections(run: RunPage) -> list[tuple[str, str]]:
    if isinstance(run.data, str):
        data = f'<p class="empty">{escaped(run.data)}</p>'
    else:
        data = f'<p class="tiles">{tiles(run.data)}</p>\n{data_tables(run.data)}'
    cards = "\n".join(map(example_card, run.examples))
    found = [evaluation_tables(*found) for found in run.evaluations]
    tables = "\n".join(filter(None, [*found, evaluations(run.evals)]))
    answers = "".join(answer_cards(*found) for found in run.evaluations)
    return [
        ("Curves", curves(run.train, run.evals)),
        ("Evaluation", f'<div class="evaluated">{tables}</div>{answers}' if tables else ""),
        ("Samples", samples(run.samples)),
        ("Data", data),
        ("Examples", f"{KEY}\n{cards}" if cards else ""),
        ("How to repeat", _repeat(run)),
    ]


def _id(title: str) -> str:
    return title.lower().replace(" ", "-")


def _facts(run: RunPage) -> str:
    """The run in a line: how far it came, and with what result."""
    found: list[tuple[str, str, str]] = []
    total = run.starts[-1].get("total_steps") if run.starts else None
    last = max((row["step"] for row in (*run.train, *run.evals)), default=0)
    found.append(("step", f"{last:,}", f"of {total:,}" if isinstance(total, int) else ""))
    if run.train:
        first, row = run.train[0], run.train[-1]
        began = f"from {written(first['loss'], '.4g')}" if len(run.train) > 1 else ""
        found.append(("training loss", written(row["loss"], ".4g"), began))
    if run.evals:
        best = min(run.evals, key=_loss)
        row = run.evals[-1]
        at = "the lowest" if row is best else f"lowest {_loss(best):.4g} at step {best['step']:,}"
        found.append(
            ("evaluation loss", written(row["eval_loss"], ".4g"), at if len(run.evals) > 1 else "")
        )
        accuracy = row.get("eval_token_accuracy")
        if isinstance(accuracy, int | float):
            found.append(("token accuracy", written(accuracy, ".1%"), "in evaluation"))
    if run.train:
        rates = sorted(
            rate
            for row in run.train
            if isinstance(rate := row.get("tokens_per_second"), int | float)
        )
        if rates:
            found.append(("tokens a second", f"{rates[len(rates) // 2]:,.0f}", "median"))
        trained = run.train[-1].get("tokens_trained")
        if isinstance(trained, int):
            found.append(("trained tokens", f"{trained:,}", ""))
    return "".join(
        f"<div><dt>{name}</dt><dd><b>{escaped(value)}</b> <small>{escaped(more)}</small></dd></div>"
        for name, value, more in found
    )


def _loss(row: Row) -> float:
    value = row["eval_loss"]
    return float("inf") if value is None or value != value else float(value)


def _repeat(run: RunPage) -> str:
    commands = "".join(
        f'<p>{escaped(what)}</p><pre tabindex="0">{escaped(command)}</pre>'
        for what, command in run.commands
    )
    starts = table(
        "Where it ran",
        ("from step", "time", "devices", "hosts", "system"),
        [
            (
                row["step"],
                str(row.get("time", "")).replace("T", " ").replace("+00:00", " UTC"),
                f"{row.get('devices', '?')} x {row.get('device', '?')}",
                row.get("hosts", ""),
                f"{row.get('system', '')}, {row.get('cores', '?')} cores",
            )
            for row in run.starts
        ],
    )
    versions = table(
        "Versions" + (" at the last start" if len(run.starts) > 1 else ""),
        ("", ""),
        list(run.starts[-1].get("versions", {}).items()) if run.starts else [],
    )
    config = (
        ""
        if run.config is None
        else "<details><summary>config.yaml, complete</summary>"
        f'<pre tabindex="0">{escaped(run.config.strip())}</pre></details>'
    )
    return f"{commands}\n{starts}\n{versions}\n{config}"
