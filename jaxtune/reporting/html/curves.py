"""Rows of metrics.jsonl as charts: which number goes onto which, and the script that draws them.

Numbers travel in an attribute of the figure, escaped like every other text; `curves.js` reads it
and writes text only as text. The page's policy names the script by its hash: no other runs.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtune.reporting.html.markup import Number, escaped, table
from jaxtune.terminal.text import printable

Row = Mapping[str, Any]
_LINES = 3  # of single data sets beside the two of all; more would hide each other
_TABLE_ROWS = 200  # of the table under the charts; the charts have every row

# title -> (unit, {key of a train row: its name}, {key of an eval row: its name})
_CHARTS: Mapping[str, tuple[str, Mapping[str, str], Mapping[str, str]]] = {
    "Loss": ("nats a trained token", {"loss": "training"}, {"eval_loss": "evaluation"}),
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
    """Points of one line, in order of steps. `marked` shows each; None is a gap; `hidden` is off
    until the reader turns it on."""

    name: str
    x: list[int]
    y: list[float | None]
    marked: bool = False
    hidden: bool = False


class Chart(NamedTuple):
    title: str
    unit: str
    series: list[Series]


def charts(train: Sequence[Row], evals: Sequence[Row]) -> list[Chart]:
    """Those that have anything to show. A number of a train row that no chart names has its own."""
    found = []
    for title, (unit, of_train, of_evals) in _CHARTS.items():
        series = [_series(name, key, train) for key, name in of_train.items()]
        series += [_series(name, key, evals, marked=True) for key, name in of_evals.items()]
        if title == "Loss":
            series += _by_dataset(evals)
        found.append(Chart(title, unit, series))
    named = {key for _, of_train, _ in _CHARTS.values() for key in of_train}
    others = dict.fromkeys(key for row in train for key in row if key not in named | _NO_CURVE)
    for key in others:
        found.append(Chart(key.replace("_", " ").capitalize(), "", [_series(key, key, train)]))
    shown = [chart._replace(series=[s for s in chart.series if _any(s)]) for chart in found]
    return [chart for chart in shown if chart.series]


def curves(train: Sequence[Row], evals: Sequence[Row]) -> str:
    """The figures, the controls over them, and the same numbers as a table."""
    found = charts(train, evals)
    if not found:
        return '<p class="empty">No step has been written yet.</p>'
    figures = "".join(_figure(chart) for chart in found)
    return f"""<div class="controls" hidden>
<label>smoothing <input type="range" id="smooth" min="0" max="0.98" step="0.02" value="0"></label>
<button type="button" id="whole" disabled>whole run</button>
<span class="hint">Drag over a chart to zoom all. On a chart with the keyboard: arrows read values,
+ and &minus; zoom, Escape shows the whole run.</span>
</div>
<p id="said" class="unseen" aria-live="polite"></p>
<div class="charts">{figures}</div>
<noscript><p class="empty">The curves need JavaScript, which is off. The table has the
numbers.</p></noscript>
<details><summary>The numbers as a table</summary>
{_numbers(train)}
</details>"""


def script() -> str:
    return (
        importlib.resources.files("jaxtune.reporting.html")
        .joinpath("curves.js")
        .read_text(encoding="utf-8")
        .strip()
    )


def policy(code: str) -> str:
    """The page's Content-Security-Policy: nothing is loaded, and only `code` runs."""
    digest = base64.b64encode(hashlib.sha256(code.encode("utf-8")).digest()).decode("ascii")
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )


def evaluations(evals: Sequence[Row]) -> str:
    """A row per evaluation and data set."""
    several = any(len(row.get("by_dataset", {})) > 1 for row in evals)
    rows = []
    for row in evals:
        parts: list[tuple[str, Row]] = [("all", row)]
        if several:
            parts += list(row.get("by_dataset", {}).items())
        for name, part in parts:
            rows.append(
                (
                    row["step"],
                    *((name,) if several else ()),
                    written(part.get("eval_loss"), ".4f"),
                    written(part.get("eval_perplexity"), ".4g"),
                    written(part.get("eval_token_accuracy"), ".1%"),
                    written(part.get("eval_tokens_trained"), ","),
                )
            )
    header = ("step", *(("data set",) if several else ()), "loss", "perplexity", "token accuracy")
    return table("While it trained", (*header, "tokens"), rows)


def written(value: Any, how: str) -> Number:
    """A number as `how` formats it; a dash for none, and in words where it is not finite."""
    if not isinstance(value, int | float):
        return Number("\u2013")
    return Number(format(value, how) if math.isfinite(value) else "not finite")


def _by_dataset(evals: Sequence[Row]) -> list[Series]:
    names = dict.fromkeys(name for row in evals for name in row.get("by_dataset", {}))
    if len(names) < 2:
        return []
    found = []
    for name in names:
        parts = [
            {"step": row["step"], **row["by_dataset"][name]}
            for row in evals
            if name in row.get("by_dataset", {})
        ]
        found.append(_series(f"evaluation: {name}", "eval_loss", parts, marked=True))
    return [line._replace(hidden=len(found) > _LINES) for line in found]


def _series(name: str, key: str, rows: Sequence[Row], *, marked: bool = False) -> Series:
    there = [row for row in rows if key in row]
    return Series(
        name, [row["step"] for row in there], [_finite(row[key]) for row in there], marked
    )


def _finite(value: Any) -> float | None:
    """JSON has neither infinity nor NaN; what is no number has no place on a curve."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _any(series: Series) -> bool:
    return any(value is not None for value in series.y)


def _figure(chart: Chart) -> str:
    payload = {
        "title": printable(chart.title),
        "noisy": chart.title not in _EXACT,
        "series": [s._replace(name=printable(s.name))._asdict() for s in chart.series],
    }
    text = json.dumps(payload, allow_nan=False, separators=(",", ":"))
    unit = f" <small>{escaped(chart.unit)}</small>" if chart.unit else ""
    return (
        f'<figure class="chart" data-chart="{escaped(text)}">'
        f"<figcaption><h3>{escaped(chart.title)}{unit}</h3></figcaption>"
        '<svg class="plot" aria-hidden="true"></svg><div class="legend"></div></figure>'
    )


def _numbers(train: Sequence[Row]) -> str:
    every = -(-len(train) // _TABLE_ROWS)
    rows = (
        [row for i, row in enumerate(train) if i % every == 0 or i == len(train) - 1]
        if every
        else []
    )
    caption = f"{len(train):,} rows" + (
        f", every {every}th and the last; metrics.jsonl has all" if every > 1 else ""
    )
    formats = {
        "step": ",", "epoch": ".2f", "loss": ".4f", "token_accuracy": ".1%", "grad_norm": ".4g",
        "learning_rate": ".4g", "tokens_trained": ",", "tokens_per_second": ",.0f",
    }  # fmt: skip
    return table(
        caption,
        [name.replace("_", " ") for name in formats],
        [[written(row.get(name), how) for name, how in formats.items()] for row in rows],
    )
