"""HTML in small parts: escaped text, tables, and the style that every page shares.

Text of a data set or of a model is hostile: it reaches a page through `escaped` only.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from jaxtune.terminal.text import printable


class Markup(str):
    """HTML that was made here, shown as it is."""


class Number(str):
    """A number as it is to be written; stands to the right."""


def escaped(value: object) -> str:
    """Safe as content and within a quoted attribute; control characters are shown as pictures."""
    return html.escape(printable(str(value)), quote=True)


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Nothing where there are no rows. Headings stand over their numbers."""
    if not rows:
        return ""
    head = "".join(
        f'<th scope="col"{_side(value)}>{escaped(name)}</th>' if name else "<td></td>"
        for name, value in zip(header, rows[0], strict=True)
    )
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return (
        f'<div class="scroll" role="group" aria-label="{escaped(caption)}" tabindex="0"><table>'
        f"<caption>{escaped(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f"<td{_side(value)}>{value:,}</td>"
    if isinstance(value, Markup):
        return f"<td>{value}</td>"
    return f'<td dir="auto"{_side(value)}>{escaped(value)}</td>'


def _side(value: object) -> str:
    return ' class="n"' if isinstance(value, int | Number) else ""


STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1c1e21; --soft: #6a7078; --line: #dfe2e6;
  --card: #f7f8f9; --on: #0b6b2e; --glow: #d9f2e0; --bad: #a3260f; --edge: #1c1e21;
  --bar: #5b8fc7; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --text: #e4e6e9; --soft: #969ca5;
  --line: #33373d; --card: #1d2024; --on: #8ee0a8; --glow: #173824; --bad: #ff9a85;
  --edge: #fff; --bar: #5f97d3; } }
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
td[dir]:not(.n) { min-width: 5.5rem; }
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
.two { display: grid; gap: 1rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); margin: 0 0 1rem;
  align-items: start; } .two .scroll { margin: 0; }
.bars { margin: 0; } .bars figcaption { font-weight: 600; padding: .3rem 0; }
.bars svg { display: block; width: 100%; } .bars line { stroke: var(--line); }
.bars text { fill: var(--soft); font-size: 10px; }
.bar { fill: var(--bar); } .rail { fill: var(--line); opacity: .6; } .was { fill: var(--soft); }
.aim { fill: var(--bad); } .bars rect:hover { fill: var(--text); }
.share { display: block; width: 8rem; height: 12px; margin-top: .35rem; }
.key { color: var(--soft); font-size: .85rem; }
.k { border: 1px solid var(--line); border-radius: 3px; padding: 0 .4em; }
"""
