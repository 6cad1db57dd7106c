"""Rows in memory -> a dataset file. Knows lists, data frames and JSON; knows no format or template.

The rows are written once, under the hash of their content, and from then on are a dataset file like
any other: fingerprints, resume, the token cache and `config.yaml` need to know nothing else. A
library of data frames is imported only if the value comes from it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.config import ConfigError, DataError
from jaxtune.data.readers import without_nulls
from jaxtune.storage import cache_eviction, object_store

_ROWS = 1000  # of a data frame turned into Python objects at once
_FILE = "data.jsonl"


def dataset_file(data: Any, *, name: str = "data") -> str:
    """Return the path of a dataset file with the rows of `data`; a path is returned as it is.

    `data`: an iterable of dicts, a `datasets.Dataset`, a pandas or polars data frame, or a path.
    `name` is what errors call it. The file lies in the cache folder, and is made again from the
    same rows if it was evicted there.

    Raises:
        DataError: `data` holds no rows, or a row that JSON cannot hold, named with its column.
        ConfigError: the cache folder cannot be written.
    """
    if isinstance(data, str | os.PathLike):
        return os.fspath(data)
    rows = _rows(data, name)
    place = object_store.default_folder() / object_store.IN_MEMORY
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=place.parent) as work:
            written = Path(work) / _FILE
            folder = place / _write(written, rows, name)
            cache_eviction.use(folder)
            if not (folder / _FILE).exists():
                object_store.free_space(written.stat().st_size)
                folder.mkdir(exist_ok=True)
                os.replace(written, folder / _FILE)
    except OSError as error:
        raise ConfigError(
            f"{place}: cannot be written: {error.strerror or error}. JAXTUNE_CACHE names another "
            "folder for rows in memory."
        ) from None
    return str(folder / _FILE)


def _write(path: Path, rows: Iterable[Any], name: str) -> str:
    """Write one JSON object a line and return the hash of them all."""
    content = hashlib.sha256()
    empty = True
    with path.open("wb") as file:
        for number, row in enumerate(rows):
            line = _line(row, f"{name}[{number}]").encode("ascii") + b"\n"
            content.update(line)
            file.write(line)
            empty = False
        file.flush()
        os.fsync(file.fileno())
    if empty:
        raise DataError(f"{name}: holds no rows: there is nothing to train in it.")
    return content.hexdigest()[:32]


def _line(row: Any, where: str) -> str:
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected a dict, came {type(row).__name__}.")
    for column in row:
        if not isinstance(column, str):
            raise DataError(f"{where}: expected text as the name of a column, came {column!r}.")
    try:
        return _json(dict(row))
    except (TypeError, ValueError, RecursionError):
        raise _unwritable(row, where) from None


def _unwritable(row: Mapping[str, Any], where: str) -> DataError:
    """Name the first column of a row that JSON cannot hold."""
    for column, value in row.items():
        try:
            _json(value)
        except (TypeError, ValueError) as error:
            reason = str(error).rstrip(".")
            if isinstance(value, float):  # the encoder's words do not say it plainly
                reason = f"{value} is no number in JSON"
            return DataError(
                f"{where}[{column!r}]: JSON cannot hold the value: {reason}. Remove the column, or "
                "turn it into text, a number, None, a list or a dict."
            )
        except RecursionError:
            return DataError(f"{where}[{column!r}]: nested too deeply for JSON.")
    return DataError(f"{where}: JSON cannot hold the row.")


def _plain(value: Any) -> Any:
    """Turn a numpy value into Python's own; `json` calls this for what it does not know itself."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"a value of type {type(value).__name__}")


# ASCII: half a surrogate pair stays readable, and such a row is dropped where others are.
_json = functools.partial(json.dumps, allow_nan=False, default=_plain)


def _rows(data: Any, name: str) -> Iterable[Any]:
    """Return the rows of `data`, each a dict if the caller made no mistake."""
    if _is_a(data, "pandas", "DataFrame"):
        return _pandas_rows(data, name)
    if _is_a(data, "polars", "DataFrame"):
        return _arrow_rows(data.iter_rows(named=True))
    if _is_a(data, "datasets", "Dataset"):
        return _arrow_rows(data)
    if _is_a(data, "datasets", "DatasetDict"):
        raise DataError(f"{name}: has several splits: {', '.join(data)}. Give one of them.")
    if _is_a(data, "polars", "LazyFrame"):
        raise DataError(f"{name}: a LazyFrame has no rows yet. Give {name}.collect().")
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise DataError(
            f"{name}: expected a list of dicts, a datasets.Dataset, a pandas or polars data frame "
            f"or a path, came {type(data).__name__}."
        )
    return data


def _arrow_rows(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield {column: without_nulls(value) for column, value in row.items()}


def _is_a(data: Any, library: str, kind: str) -> bool:
    """Tell whether `data` is of a library's class; a library not imported has made no value."""
    found = getattr(sys.modules.get(library), kind, None)
    return isinstance(found, type) and isinstance(data, found)


def _pandas_rows(frame: Any, name: str) -> Iterator[dict[Any, Any]]:
    """Yield rows as dicts, in which what pandas calls missing (NaN, NA, NaT) is None."""
    if not frame.columns.is_unique:
        column = frame.columns[frame.columns.duplicated()][0]
        raise DataError(f"{name}: two columns are called {column!r}.")
    pandas = sys.modules["pandas"]
    for start in range(0, len(frame), _ROWS):
        for row in frame.iloc[start : start + _ROWS].to_dict("records"):
            yield {column: _or_none(value, pandas) for column, value in row.items()}


def _or_none(value: Any, pandas: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return None
    return None if value is pandas.NA or value is pandas.NaT else value
