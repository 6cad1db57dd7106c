"""One self-contained HTML page: examples token by token, and the data report as tables.

Takes plain values only. Text of a data set is hostile: everything goes through `_text`, the page
has no script, and its policy forbids the browser to load or run anything.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtune.draw.terminal import printable


class Piece(NamedTuple):
    """What one token shows; several where a letter is spread over them. `weight` is its loss's."""

    text: str
    ids: Sequence[int]
    weight: float


class Shown(NamedTuple):
    """An example with its heading; `dropped` says why it is not trained, None if it is."""

    title: str
    pieces: Sequence[Piece]
    dropped: str | None = None


def page(title: str, examples: Iterable[Shown], report: Mapping[str, Any]) -> str:
    """The whole document. `report` is that of `data.doctor`."""
    cards = "\n".join(_example(example) for example in examples)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{_text(title)}</h1>
<p class="tiles">{_tiles(report)}</p>
</header>
<main>
<section>
<h2>Data</h2>
{_tables(report)}
</section>
<section>
<h2>Examples</h2>
<p class="key"><span class="k y">trained</span> <span class="k">context</span>
a token's ids and weight appear when the pointer rests on it</p>
{cards or "<p>none asked for</p>"}
</section>
</main>
</body>
</html>
"""


def _text(value: object) -> str:
    """Safe as content and within a quoted attribute; control characters are shown as pictures."""
    return html.escape(printable(str(value)), quote=True)


def _example(example: Shown) -> str:
    dropped = "" if example.dropped is None else f'<p class="d">{_text(example.dropped)}</p>'
    parts: list[str] = []
    before = None
    for piece in example.pieces:
        trained = piece.weight != 0 and example.dropped is None
        if trained and piece.weight not in (1, before):
            parts.append(f'<b class="w">&times;{piece.weight:g}</b>')
        before = piece.weight
        ids = " ".join(map(str, piece.ids))
        shown = _text(piece.text).replace("\n", "<i>\u21b5</i>\n")
        parts.append(
            f'<span class="t{" y" if trained else ""}" title="{ids}, weight {piece.weight:g}">'
            f"{shown}</span>"
        )
    body = f'<div class="tokens" dir="auto">{"".join(parts)}</div>' if parts else ""
    return f"<article><h3>{_text(example.title)}</h3>{dropped}{body}</article>"


def _tiles(report: Mapping[str, Any]) -> str:
    found = [
        (f"{report['examples']:,}", "examples"),
        (f"{report['tokens_total']:,}", "tokens"),
        (f"{report['trained_share']:.1%}", "trained"),
        (f"{report['dropped']:,}", "dropped"),
    ]
    packing = report.get("packing")
    if packing:
        found.append((f"{packing['fill']:.1%}", "of each row filled"))
        if "total_steps" in packing:
            found.append((f"{packing['total_steps']:,}", "steps"))
    return "".join(f"<span><b>{value}</b> {name}</span>" for value, name in found)


def _tables(report: Mapping[str, Any]) -> str:
    quantiles = ("p50", "p90", "p99", "max")
    tables = [
        _table(
            "Lengths in tokens",
            ("", *quantiles),
            [
                (name, *(report[key].get(q, 0) for q in quantiles))
                for name, key in (("example", "lengths"), ("trained", "trained_lengths"))
            ],
        ),
        _table(
            "Sources",
            ("", "format", "examples", "tokens", "trained"),
            [
                (name, part["format"], part["examples"], part["tokens_total"],
                 part["tokens_trained"])
                for name, part in report["by_dataset"].items()
            ],
        ),
        _table(
            "Mixture",
            ("", "value", "examples", "share before", "drawn in an epoch", "share after"),
            [
                (part["dataset"], "" if part["value"] is None else part["value"],
                 part["examples"], f"{part['share_before']:.1%}",
                 part["per_epoch"], f"{part['share_after']:.1%}")
                for part in report.get("mixture", ())
            ],
        ),
        _table(
            "Found",
            ("", "count"),
            [(meaning, report[flag]) for flag, meaning in report["flags"].items() if report[flag]],
        ),
    ]  # fmt: skip
    tables += [
        _table(
            f"By {column}",
            ("", "records", "examples"),
            [(value, part["records"], part["examples"]) for value, part in values.items()],
        )
        for column, values in report.get("columns", {}).items()
    ]
    if report.get("evaluation"):
        held = report["evaluation"]
        rows = [(name.replace("_", " "), count) for name, count in held.items()]
        tables.append(_table("Evaluation", ("", "count"), rows))
    dropped = [
        (reason, found["count"], "\n".join(
            f"{first['where']}{': ' if first['detail'] else ''}{first['detail']}"
            for first in found["first"][:3]))
        for reason, found in report["dropped_by_reason"].items()
    ]  # fmt: skip
    if dropped:
        tables.append(_table("Dropped", ("reason", "count", "first"), dropped))
    notes = "".join(f"<li>{_text(note)}</li>" for note in report["notes"])
    return "\n".join(tables) + (f"<ul>{notes}</ul>" if notes else "")


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Nothing where there are no rows. Headings stand over their numbers."""
    if not rows:
        return ""
    head = "".join(
        f'<th class="n">{_text(name)}</th>' if isinstance(value, int) else f"<th>{_text(name)}</th>"
        for name, value in zip(header, rows[0], strict=True)
    )
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><caption>{_text(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f'<td class="n">{value:,}</td>'
    return f'<td dir="auto">{_text(value)}</td>'


_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1c1e21; --soft: #6a7078; --line: #dfe2e6;
  --card: #f7f8f9; --on: #0b6b2e; --glow: #d9f2e0; --bad: #a3260f; --edge: #1c1e21; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --text: #e4e6e9; --soft: #969ca5;
  --line: #33373d; --card: #1d2024; --on: #8ee0a8; --glow: #173824; --bad: #ff9a85;
  --edge: #fff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
h3 { font-size: .85rem; margin: 0 0 .4rem; color: var(--soft); overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; color: var(--soft); }
.tiles b { color: var(--text); font-size: 1.15rem; }
.scroll { overflow-x: auto; margin: 0 0 1rem; }
table { border-collapse: collapse; min-width: min(100%, 24rem); }
caption { text-align: start; font-weight: 600; padding: .3rem 0; }
th, td { text-align: start; vertical-align: top; padding: .2rem .8rem .2rem 0;
  border-top: 1px solid var(--line); white-space: pre-wrap; overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 400; white-space: nowrap; }
.n { text-align: end; font-variant-numeric: tabular-nums; white-space: nowrap; }
ul { padding-inline-start: 1.2rem; color: var(--soft); overflow-wrap: anywhere; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: .8rem; margin: 0 0 .8rem; }
.tokens { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  color: var(--soft); unicode-bidi: isolate; }
.t:hover { outline: 1px solid var(--edge); outline-offset: 1px; border-radius: 2px; }
.y { color: var(--on); background: var(--glow); }
.tokens i { opacity: .4; font-style: normal; user-select: none; }
.w { color: var(--bad); font-size: .75em; padding: 0 .2em; user-select: none; }
.d { color: var(--bad); margin: 0 0 .4rem; overflow-wrap: anywhere; }
.key { color: var(--soft); font-size: .85rem; }
.k { border: 1px solid var(--line); border-radius: 3px; padding: 0 .4em; }
"""
