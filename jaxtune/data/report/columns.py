"""Values of a column of the records, one for each example of a dataset."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxtune.data import preprocess
from jaxtune.data.dataset import Dataset

ABSENT = "(absent)"
_LONGEST = 60  # letters of a value


def column_values(
    dataset: Dataset, entries: Sequence[preprocess.Entry], column: str
) -> NDArray[np.object_] | None:
    """Read the value of each example's record as one short line; None if no record has the column.

    `entries` are those `dataset` was opened from; they are read again. A record without the column
    has `ABSENT`.
    """
    found = np.full(len(dataset), ABSENT, object)
    rows, present = dataset.gather("rows"), False
    for number, entry in enumerate(entries):
        own = np.flatnonzero(dataset.source_of == number)
        wanted = set(rows[own].tolist())
        values: dict[int, str] = {}
        for row, (_, _, fields) in preprocess.read(entry):
            if row in wanted and column in fields:
                values[row] = _shown(fields[column])
        present |= bool(values)
        found[own] = [values.get(row, ABSENT) for row in rows[own].tolist()]
    return found if present else None


def column_names(entries: Sequence[preprocess.Entry]) -> list[str]:
    """List the columns of the first record of each source, in order, once."""
    first = (next(preprocess.read(entry), None) for entry in entries)
    return list(dict.fromkeys(name for found in first if found for name in found[1].fields))


def _shown(value: Any) -> str:
    """Shorten a value to one line, so that counting a column of long texts costs little."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    line = " ".join(text[: 2 * _LONGEST].split())
    return line[:_LONGEST] + "..." if len(line) > _LONGEST else line or "(empty)"
