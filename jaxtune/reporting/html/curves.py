"""Rows of metrics.jsonl as charts: which number goes onto which, and the script that draws them.

Numbers travel in an attribute of the figure, escaped like every other text; `curves.js` reads it
and writes text only as text. The page's policy names the script by its hash: no other runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from jaxtune.evaluation.metric_names import is_number
from jaxtune.html import resource, source_hash
from jaxtune.reporting.html.markup import PACKAGE, Number, Table, part
from jaxtune.terminal.text import printable

Row = Mapping[str, Any]
_LINES = 3  # of single data sets beside the two of all; more would hide each other
_TABLE_ROWS = 200  # of the table under the charts; the charts have every row

# title -> (unit, {key of a train row: its name}, {key of an eval row: its name})
_CHARTS: Mapping[str, tuple[str, Mapping[str, str], Mapping[str, str]]] = {
    "Loss": (
        "nats a trained token", {"loss": "training", "nll": "training, nll"},
        {"eval_loss": "evaluation"},
    ),
    "Token accuracy": (
        "share of trained tokens", {"token_accuracy": "training"},
        {"eval_token_accuracy": "evaluation"},
    ),
    "Learning rate": ("", {"learning_rate": "learning rate"}, {}),
    "Gradient norm": ("before clipping", {"grad_norm": "gradient norm"}, {}),
    "Throughput": ("tokens a second", {"tokens_per_second": "tokens a second"}, {}),
    "Model FLOPs utilisation": ("share of the peak", {"mfu": "MFU"}, {}),
}  # fmt: skip
_EXACT = {"Learning rate"}  # is known, not measured: nothing to smooth
_NO_CURVE = {"step", "epoch", "tokens_total", "tokens_trained", "examples_seen"}


class Series(NamedTuple):
    """A line's points in order of steps. `marked` shows each; None is a gap; `hidden` is off until
    the reader turns it on."""

    name: str
    x: list[int]
    y: list[float | None]
    marked: bool = False
    hidden: bool = False


class Chart(NamedTuple):
    """A chart with its lines."""

    title: str
    unit: str
    series: list[Series]


def charts(train: Sequence[Row], evals: Sequence[Row]) -> list[Chart]:
    """Choose the charts that have anything to show; a number that none names has its own."""
    every = []
    for title, (unit, of_train, of_evals) in _CHARTS.items():
        series = [_series(name, key, train) for key, name in of_train.items()]
        series += [_series(name, key, evals, marked=True) for key, name in of_evals.items()]
        if title == "Loss":
            series += _by_dataset(evals)
        every.append(Chart(title, unit, series))
    named = {key for _, of_train, _ in _CHARTS.values() for key in of_train}
    others = dict.fromkeys(key for row in train for key in row if key not in named | _NO_CURVE)
    for key in others:
        every.append(Chart(key.replace("_", " ").capitalize(), "", [_series(key, key, train)]))
    shown = [chart._replace(series=[s for s in chart.series if _any(s)]) for chart in every]
    return [chart for chart in shown if chart.series]


def curves(train: Sequence[Row], evals: Sequence[Row]) -> Markup:
    """Write the figures, the controls over them, and the same numbers as a table."""
    return part("curves", [_figure(chart) for chart in charts(train, evals)], _numbers(train))


def script() -> str:
    """Read the script that draws the charts."""
    return resource(PACKAGE, "curves.js").strip()


def policy(code: str) -> str:
    """Write the Content-Security-Policy: nothing is loaded, and only `code` runs."""
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {source_hash(code)}; "
        "base-uri 'none'; form-action 'none'"
    )


def evaluations(evals: Sequence[Row]) -> Table:
    """List the evaluations of a run, a row for each and for each data set."""
    several = any(len(row.get("by_dataset", {})) > 1 for row in evals)
    rows = []
    for row in evals:
        groups: list[tuple[str, Row]] = [("all", row)]
        if several:
            groups += list(row.get("by_dataset", {}).items())
        for name, scores in groups:
            rows.append(
                (
                    row["step"],
                    *((name,) if several else ()),
                    written(scores.get("eval_loss"), ".4f"),
                    written(scores.get("eval_perplexity"), ".4g"),
                    written(scores.get("eval_token_accuracy"), ".1%"),
                    written(scores.get("eval_tokens_trained"), ","),
                )
            )
    header = ("step", *(("data set",) if several else ()), "loss", "perplexity", "token accuracy")
    return Table("While it trained", (*header, "tokens"), rows)


def written(value: Any, how: str) -> Number:
    """Format a number; a dash for none, and in words where it is not finite."""
    if not isinstance(value, int | float):
        return Number("\u2013")
    return Number(format(value, how) if math.isfinite(value) else "not finite")


def _by_dataset(evals: Sequence[Row]) -> list[Series]:
    names = dict.fromkeys(name for row in evals for name in row.get("by_dataset", {}))
    if len(names) < 2:
        return []
    lines = []
    for name in names:
        parts = [
            {"step": row["step"], **row["by_dataset"][name]}
            for row in evals
            if name in row.get("by_dataset", {})
        ]
        lines.append(_series(f"evaluation: {name}", "eval_loss", parts, marked=True))
    return [line._replace(hidden=len(lines) > _LINES) for line in lines]


def _series(name: str, key: str, rows: Sequence[Row], *, marked: bool = False) -> Series:
    there = [row for row in rows if key in row]
    return Series(
        name, [row["step"] for row in there], [_finite(row[key]) for row in there], marked
    )


def _finite(value: Any) -> float | None:
    """Return None for what is no finite number: JSON has neither infinity nor NaN."""
    return value if is_number(value) else None


def _any(series: Series) -> bool:
    return any(value is not None for value in series.y)


def _figure(chart: Chart) -> dict[str, str]:
    payload = {
        "title": printable(chart.title),
        "noisy": chart.title not in _EXACT,
        "series": [s._replace(name=printable(s.name))._asdict() for s in chart.series],
    }
    text = json.dumps(payload, allow_nan=False, separators=(",", ":"))
    return {"title": chart.title, "unit": chart.unit, "data": text}


def _numbers(train: Sequence[Row]) -> Table:
    every = max(1, -(-len(train) // _TABLE_ROWS))
    rows = [row for i, row in enumerate(train) if i % every == 0 or i == len(train) - 1]
    caption = f"{len(train):,} rows" + (
        f", every {every}th and the last; metrics.jsonl has all" if every > 1 else ""
    )
    formats = {
        "step": ",", "epoch": ".2f", "loss": ".4f", "token_accuracy": ".1%", "grad_norm": ".4g",
        "learning_rate": ".4g", "tokens_trained": ",", "tokens_per_second": ",.0f",
    }  # fmt: skip
    return Table(
        caption,
        [name.replace("_", " ") for name in formats],
        [[written(row.get(name), how) for name, how in formats.items()] for row in rows],
    )
