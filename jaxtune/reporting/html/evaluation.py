"""What `evaluate --json` printed, as tables of a page: scores, groups, benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtune.evaluation.tables import LEGEND, Sheet, judge_lines, sheets
from jaxtune.reporting.html.markup import Markup, Number, escaped, table

_COLOURED = {"better": "right", "worse": "wrong"}


def evaluation_tables(name: str, found: Mapping[str, Any]) -> str:
    """All that is in it but the answers. `name` is that of its file."""
    base = found.get("base")
    columns = {"base": base, "tuned": found} if base else {"model": found}
    tables = "\n".join(_table(name, sheet) for sheet in sheets(columns, counts=True))
    said = [*judge_lines(found), *([LEGEND] if "difference" in found else [])]
    notes = "".join(f"<p>{escaped(line)}</p>" for line in said)
    return f'{tables}<div class="found empty">{notes}</div>'


def _table(name: str, sheet: Sheet) -> str:
    caption = f"{name}: {sheet.caption}" if sheet.caption else name
    width = len(sheet.header)
    rows = [
        [
            _cell(cell, number, sheet)
            for number, cell in enumerate((*row, *[""] * (width - len(row))))
        ]
        for row in sheet.rows
    ]
    return table(caption, sheet.header, rows)


def _cell(cell: str, number: int, sheet: Sheet) -> object:
    if cell in _COLOURED and number:
        return Markup(f'<b class="{_COLOURED[cell]}">{cell}</b>')
    return Number(cell) if 0 < number <= sheet.numbers else cell
