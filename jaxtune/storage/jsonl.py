"""Rows of metrics.jsonl and samples.jsonl: as JSON, and back from the file. Knows no JAX.

JSON has no infinity and no NaN: in a row they are the texts "inf", "-inf" and "nan".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtune.storage.atomic_write import write_whole

Row = dict[str, Any]
_WORDS = {word: float(word) for word in ("inf", "-inf", "nan")}


def number(value: Any) -> float | str:
    """As JSON can hold it: what is not finite is text."""
    as_float = float(value)
    return as_float if math.isfinite(as_float) else str(as_float)


def as_json(row: Mapping[str, Any]) -> str:
    """Make a line of JSON, without its end."""
    return json.dumps(_each(row, lambda v: number(v) if isinstance(v, float) else v))


def from_json(row: Mapping[str, Any]) -> Row:
    """Make numbers again where `as_json` wrote text."""
    return _each(row, lambda v: _WORDS.get(v, v) if isinstance(v, str) else v)


def _each(row: Mapping[str, Any], change: Any) -> Row:
    return {
        name: _each(value, change) if isinstance(value, Mapping) else change(value)
        for name, value in row.items()
    }


def keep_rows_up_to(path: Path, step: int, *, due: bool = False) -> None:
    """Drop the rows of later steps from a .jsonl file, and half a line that a killed run left;
    while the evaluation of `step` is `due`, also what an earlier try at it wrote."""
    if not path.exists():
        return

    def stays(row: Row) -> bool:
        again = due and row["step"] == step and row.get("kind") != "train"
        return bool(row["step"] <= step and not again)

    remaining = [line + "\n" for line, row in _lines(path) if stays(row)]
    write_whole(path, "".join(remaining))


def last_rows(path: Path, step: int, *, best: int | None = None) -> dict[str, Row]:
    """By kind the last row of metrics.jsonl up to `step`; with `best`, of evaluations only that
    step's. Empty where there is no file."""
    last_of_kind: dict[str, Row] = {}
    for _, row in _lines(path) if path.exists() else ():
        of_other = best is not None and row.get("kind") == "eval" and row["step"] != best
        if row["step"] <= step and "kind" in row and not of_other:
            last_of_kind[row["kind"]] = from_json(row)
    return last_of_kind


def _lines(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield each line that is a row, as text and as a mapping."""
    for line in path.read_bytes().split(b"\n"):  # at line feeds alone: U+2028 is text of a sample
        try:
            row = json.loads(line)
            text, _ = line.decode("utf-8"), row["step"] + 0
        except (ValueError, TypeError, LookupError, RecursionError):  # of a killed run, or damaged
            continue
        yield text, row
