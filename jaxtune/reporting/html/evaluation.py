"""Scores, groups and benchmarks of `evaluate --json` as tables of a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from jaxtune.evaluation.tables import LEGEND, Sheet, judge_lines, sheets_of
from jaxtune.reporting.html.markup import Number, Table, part

_COLOURED = {"better": "right", "worse": "wrong"}


def evaluation_tables(name: str, evaluation: Mapping[str, Any]) -> Markup:
    """Write all of an evaluation but its answers; `name` is that of its file."""
    tables = [_table(name, sheet) for sheet in sheets_of(evaluation)]
    legend = [LEGEND] if "difference" in evaluation else []
    return part("scores", tables, [*judge_lines(evaluation), *legend])


def _table(name: str, sheet: Sheet) -> Table:
    rows = [[_cell(cell, i, sheet) for i, cell in enumerate(row)] for row in sheet.rows]
    return Table(f"{name}: {sheet.caption}" if sheet.caption else name, sheet.header, rows)


def _cell(cell: str, number: int, sheet: Sheet) -> object:
    if cell in _COLOURED and number:
        return Markup('<b class="{}">{}</b>').format(_COLOURED[cell], cell)
    return Number(cell) if 0 < number <= sheet.numbers else cell
