"""The cache of tokenised data: flat memory-mapped arrays in a folder named after what made them.

Knows arrays and folders; knows no record and no template. A folder appears under its name only when
it is complete, so a killed writer leaves nothing that could be opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# name -> element type; all 1-D
ARRAYS: dict[str, np.dtype[Any]] = {
    "ids": np.dtype(np.int32),  # every example's tokens, one after the other
    "weights": np.dtype(np.float32),  # and their weights as targets
    "offsets": np.dtype(np.int64),  # example i is ids[offsets[i]:offsets[i + 1]]
    "trained": np.dtype(np.int32),  # how many of example i's tokens carry weight
    "rows": np.dtype(np.int64),  # the record, from 0, that example i came from
    "values": np.dtype(np.int32),  # example i's value in the column of `proportions`, by number
    "flags": np.dtype(np.uint8),  # bits, by `preprocess.FLAGS`
    "lost": np.dtype(np.int32),  # trained tokens of example i cut off by truncation
    "digests": np.dtype(np.uint64),  # of example i's ids, to find duplicates
    "signatures": np.dtype(np.uint32),  # PLACES numbers each, by `near_duplicates.signatures`
}
_SUMMARY = "summary.json"


class CachedSource(NamedTuple):
    """A tokenised source: the arrays of `ARRAYS`, memory-mapped, and what was counted."""

    arrays: dict[str, NDArray[Any]]
    summary: dict[str, Any]


def code_version() -> str:
    """Hash the source of the data package: other code or templates make other tokens."""
    package = Path(__file__).parent
    sources = sorted(p for p in package.rglob("*") if p.suffix in (".py", ".jinja"))
    return hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()


def stored(
    folder: Path, key: str, build: Callable[[Writer], dict[str, Any]]
) -> tuple[CachedSource, str | None]:
    """Open the arrays under `key`; build them by `build(writer) -> summary` if they are not there.

    The second result is a note for the user when the cache could not be written; the arrays then
    live in a temporary folder that the operating system cleans up.
    """
    final = folder / key
    if (final / _SUMMARY).exists():
        return _open(final), None
    note = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".building-", dir=folder))
    except OSError as error:
        note = f"data cache {folder} cannot be written ({error.strerror}); tokenising without it"
        work = Path(tempfile.mkdtemp(prefix="jaxtune-"))
        final = work / key
    target = work / "data"
    try:
        with Writer(target) as writer:
            summary = build(writer)
        (target / _SUMMARY).write_text(json.dumps(summary), encoding="utf-8")
        try:
            os.replace(target, final)
        except OSError:
            if not (final / _SUMMARY).exists():  # else another process has finished the same
                raise
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    if note is None:
        shutil.rmtree(work, ignore_errors=True)
    return _open(final), note


def _open(folder: Path) -> CachedSource:
    arrays = {name: _load(folder / f"{name}.npy") for name in ARRAYS}
    return CachedSource(arrays, json.loads((folder / _SUMMARY).read_text(encoding="utf-8")))


def _load(path: Path) -> NDArray[Any]:
    array: NDArray[Any] = np.load(path, mmap_mode="r")
    return array


class Writer:
    """A new folder whose arrays (those of `ARRAYS`) are appended to; memory does not grow with
    them.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._files = {name: (folder / f"{name}.npy").open("wb+") for name in ARRAYS}
        self._counts = dict.fromkeys(ARRAYS, 0)
        self._hash = hashlib.sha256()
        for name in ARRAYS:
            self._write_header(name)

    def append(self, name: str, values: NDArray[Any]) -> None:
        data = np.ascontiguousarray(values, ARRAYS[name]).tobytes()
        self._hash.update(data)
        self._files[name].write(data)
        self._counts[name] += len(values)

    @property
    def content(self) -> str:
        """Return the SHA-256 of everything appended so far."""
        return self._hash.hexdigest()

    def _write_header(self, name: str) -> None:
        # numpy leaves room in the header for the first axis to grow, so it can be written again.
        header = {"descr": ARRAYS[name].str, "fortran_order": False, "shape": (self._counts[name],)}
        self._files[name].seek(0)
        np.lib.format.write_array_header_1_0(self._files[name], header)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, file in self._files.items():
            if error is None:
                self._write_header(name)
            file.close()
