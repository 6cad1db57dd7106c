"""Safetensors folders as bytes: slices in, shards out. Never a pickle, never torch.

A header is believed only as far as the file bears it out: sizes, offsets and shapes are checked
before anything is mapped, and an index may name only files of its own folder. Nothing here knows
what a tensor means.

Not the reader of the safetensors library: it copies what it reads, and a read here is a view of the
mapped file. Copied on into a parameter, 503 MB of the page cache in 24 tensors [4096 2560] took the
library 2.5 times as long in whole tensors, 2.1 by rows and 1.8 by columns (0.8.0, two cores).

Format (huggingface/safetensors): 8 bytes little-endian header length, a JSON header of
{name: {dtype, shape, data_offsets}}, then the values, row-major, little-endian.
"""

import errno
import functools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxtune.config import ModelError
from jaxtune.hf.transpose import PAGE, Scratch, run_ahead
from jaxtune.storage.safe_read import (
    MAX_TABLE,
    open_inside,
    parse_json,
    plain,
    read_object,
    reason,
    shown,
    some,
)

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_BYTES = "U8"  # no number by itself: what quantised formats pack theirs in
CODES = {dtype: code for code, dtype in DTYPES.items()}

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_READ = 1 << 19  # bytes read back at a time: whole pages, in memory that is used again
_scratch = Scratch()
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth")


class Tensor(NamedTuple):
    """A tensor's place: `code` is the file's dtype, `start` the byte its values begin at."""

    file: Path
    code: str
    shape: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> np.dtype:
        if self.code not in DTYPES:
            raise ModelError(
                f"{self.file}: holds {plain(self.code)} values; this version reads "
                f"{', '.join(DTYPES)}."
            )
        return DTYPES[self.code]


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by name, from its index or its single file; reads headers only."""
    if (folder / INDEX).exists():
        return _open_sharded(folder)
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    pickled = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"{folder}: the weights are pickled ({plain(pickled[0])}), which can run code when "
            "opened and is never read. Use a revision with safetensors, or convert the folder "
            "first."
        )
    names = sorted(path.name for path in folder.iterdir())
    raise ModelError(
        f"{folder}: no weights: expected {SINGLE} or {INDEX}; found {some(names, 12) or 'nothing'}."
        " To start from random weights set init: random."
    )


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, every claim of the header checked against the file's size."""
    with open(open_inside(file, file.parent), "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise ModelError(
                f"{file}: claims a header of {length} bytes in a file of {size}. The file is "
                "damaged or not safetensors; download it again."
            )
        text = handle.read(length)
    try:
        header = parse_json(text)
        header.pop("__metadata__", None)
        entries = {name: _entry(entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: unreadable safetensors header ({reason(error)}).") from None
    base = 8 + length
    _check_extent(file, size - base, entries)
    return {
        name: Tensor(file, code, shape, base + begin)
        for name, (code, shape, begin, _) in entries.items()
    }


def fetch(tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray:
    """The values in `index` (unit steps), as a read-only view of the mapped file."""
    return _mapped(tensor, tensor.dtype)[index]


def fetch_bytes(tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray:
    """The same of a tensor of packed bytes."""
    if tensor.code != _BYTES:
        raise ModelError(f"{tensor.file}: holds {plain(tensor.code)} values; expected {_BYTES}.")
    return _mapped(tensor, np.dtype(np.uint8))[index]


def _mapped(tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    if 0 in tensor.shape:
        return np.empty(tensor.shape, dtype)
    now = tensor.file.stat()
    whole = _map(tensor.file, (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns))
    size = math.prod(tensor.shape) * dtype.itemsize
    return whole[tensor.start : tensor.start + size].view(dtype).reshape(tensor.shape)


@functools.lru_cache(maxsize=16)
def _map(file: Path, identity: tuple[int, ...]) -> np.ndarray:
    """The bytes of a file, mapped once: a page of a new mapping is a fault of its own, and eight
    devices that each want some columns would touch every page eight times. A file that was replaced
    has another identity."""
    return np.asarray(np.memmap(file, np.uint8, "r"))


def _open_sharded(folder: Path) -> dict[str, Tensor]:
    index = folder / INDEX
    files = read_object(index, folder, limit=MAX_TABLE).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ModelError(f"{index}: not a safetensors index: no weight_map of names to files.")
    headers: dict[str, dict[str, Tensor]] = {}
    for file in sorted({*files.values()}):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(f"{index}: names {shown(file)}; only safetensors beside it are read.")
        if not os.path.lexists(folder / file):  # also where no name can be so long
            raise ModelError(f"{folder}: {plain(file)} is missing, though the index names it.")
        headers[file] = read_header(folder / file)
    absent = [name for name, file in files.items() if name not in headers[file]]
    if absent:
        raise ModelError(f"{index}: {some(absent)} not in the file the index names.")
    return {name: headers[file][name] for name, file in files.items()}


_Entry = tuple[str, tuple[int, ...], int, int]  # dtype, shape, begin and end behind the header


def _entry(entry: Mapping[str, Any]) -> _Entry:
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError("shape and data_offsets must be non-negative integers")
    if not isinstance(entry["dtype"], str):
        raise ValueError(f"dtype {shown(entry['dtype'])}")
    return entry["dtype"], shape, begin, end


def _check_extent(file: Path, size: int, entries: Mapping[str, _Entry]) -> None:
    """Tensors fill the `size` bytes behind the header, none over another, nothing between them."""
    reached = 0
    for name, (code, shape, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        dtype = (
            np.dtype(np.uint8) if code == _BYTES else DTYPES.get(code)
        )  # others may lie in the file as long as nobody wants them
        fault = None
        if end < begin:
            fault = "ends before it begins"
        elif dtype is not None and end - begin != math.prod(shape) * dtype.itemsize:
            fault = f"has {end - begin} bytes, which is not {code} {_brief(shape)}"
        elif begin < reached:
            fault = "overlaps another tensor"
        elif begin > reached:
            fault = f"comes after {begin - reached} bytes that belong to no tensor"
        elif end > size:
            fault = "ends after the file"
        if fault:
            raise ModelError(
                f"{file}: {plain(name)} {fault}. The file is damaged; download it again."
            )
        reached = end
    if reached != size:
        raise ModelError(
            f"{file}: {size - reached} bytes after the last tensor belong to none. The file is "
            "damaged; download it again."
        )


def _brief(shape: Sequence[int]) -> str:
    return shown(list(shape))[1:-1]


class ShardPlan(NamedTuple):
    """A file to write: its name, its header's bytes, each tensor's place, its whole size."""

    file: str
    header: bytes
    tensors: dict[str, tuple[np.dtype, tuple[int, ...], int]]
    size: int


def plan_shards(
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], max_shard_bytes: int
) -> list[ShardPlan]:
    """Split tensors, in their order, into files of at most `max_shard_bytes` of values.

    A tensor larger than the limit gets a file of its own. Names are those of transformers.
    """
    groups: list[dict[str, tuple[np.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = (dtype, shape)
        filled += size
    count = len(groups)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return [
        _plan(file, group)
        for file, group in zip(names if count > 1 else [SINGLE], groups, strict=True)
    ]


def index_of(plans: Sequence[ShardPlan]) -> dict[str, Any]:
    """The content of `model.safetensors.index.json`."""
    total = sum(
        math.prod(shape) * dtype.itemsize
        for plan in plans
        for dtype, shape, _ in plan.tensors.values()
    )
    weight_map = {name: plan.file for plan in plans for name in plan.tensors}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


class WrittenRun(NamedTuple):
    """A run of bytes of a file, and the `checksum` that they had when they were handed over."""

    name: str  # the tensor's
    file: Path
    start: int
    size: int
    checksum: np.ndarray


class ShardWriter:
    """Writes tensors, whole or by rows and in any order, into files whose headers stand first.

    Whole pages go past the system's cache, where the file system can: the cache would take as much
    memory as the files and time to fill, for values nobody reads. Holds no values; may be used by
    several threads. Leaving the `with` block without an error checks that every byte planned came
    once; `flush` then brings a file to the disk. `OSError` passes through.
    """

    def __init__(self, folder: Path, plans: Sequence[ShardPlan]) -> None:
        self._files: dict[str, int] = {}
        self._direct: dict[str, int | None] = {}
        self._places: dict[str, tuple[Path, np.dtype, tuple[int, ...], int]] = {}
        self.written: list[WrittenRun] = []
        try:
            for plan in plans:
                file = folder / plan.file
                handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
                self._files[plan.file] = handle
                _write_at(handle, plan.header, 0)
                os.ftruncate(handle, plan.size)
                self._direct[plan.file] = _open_direct(file)
                for name, (dtype, shape, start) in plan.tensors.items():
                    self._places[name] = (file, dtype, shape, start)
        except OSError:
            self._close()
            raise

    def place(self, name: str, first_row: int = 0) -> int:
        """The byte of its file that a row begins at. Values in memory that begins as far behind a
        page as this (`Scratch.empty(past=...)`) are written fastest."""
        _, dtype, shape, start = self._places[name]
        return start + first_row * math.prod(shape[1:]) * dtype.itemsize

    def write(self, name: str, values: np.ndarray, first_row: int = 0) -> WrittenRun:
        """Rows of a tensor from `first_row` on, in the dtype and the other sizes planned."""
        file, dtype, shape, _ = self._places[name]
        rows = shape[:1]
        fits = values.dtype == dtype and values.shape[1:] == shape[1:] and values.ndim == len(shape)
        if not fits or any(
            first_row + n > most for n, most in zip(values.shape, rows, strict=False)
        ):
            raise ValueError(f"{name}: {values.dtype}{values.shape}; planned {dtype}{shape}")
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        place = self.place(name, first_row)
        run = WrittenRun(name, file, place, flat.size, checksum(flat))
        self._put(file.name, flat, place)
        self.written.append(run)
        return run

    def _put(self, file: str, flat: np.ndarray, place: int) -> None:
        """Pages that are whole in memory and in the file alike go straight to the disk."""
        first, direct = -place % PAGE, self._direct[file]
        last = flat.size - (place + flat.size) % PAGE
        if direct is None or first >= last or (flat.ctypes.data + first) % PAGE:
            _write_at(self._files[file], flat.data, place)
            return
        _write_at(direct, flat[first:last].data, place + first)
        _write_at(self._files[file], flat[:first].data, place)
        _write_at(self._files[file], flat[last:].data, place + last)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._check_complete()
        finally:
            self._close()

    def _check_complete(self) -> None:
        ends = {name: start for name, (_, _, _, start) in self._places.items()}
        for run in sorted(self.written, key=lambda run: (run.file, run.start)):
            if run.start != ends[run.name]:
                raise ValueError(f"{run.name}: bytes {ends[run.name]} to {run.start} do not fit")
            ends[run.name] += run.size
        lacking = [
            name
            for name, (_, dtype, shape, start) in self._places.items()
            if ends[name] != start + math.prod(shape) * dtype.itemsize
        ]
        if lacking:
            raise ValueError(f"never written: {some(lacking)}")

    def _close(self) -> None:
        for handle in (*self._files.values(), *self._direct.values()):
            if handle is not None:
                os.close(handle)
        self._files, self._direct = {}, {}


def flush(file: Path) -> None:
    """Return when the disk has all of `file`."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def damaged(runs: Sequence[WrittenRun]) -> Iterator[WrittenRun]:
    """Yield the runs of one file that the disk gives other than they were written.

    The disk, not the system's copy of it: the file is brought there first, and read past the cache
    where the file system has a way.
    """
    file = runs[0].file
    flush(file)
    direct = _open_direct(file)
    handle = os.open(file, os.O_RDONLY) if direct is None else direct
    try:
        if direct is None:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        in_order = sorted(runs, key=lambda run: run.start)
        check = functools.partial(_reads_back, handle)
        for run, same in zip(in_order, run_ahead(check, in_order), strict=True):
            if not same:
                yield run
    finally:
        os.close(handle)


def _reads_back(handle: int, run: WrittenRun) -> bool:
    buffer = _scratch.empty((_READ + 2 * PAGE,), np.dtype(np.uint8))
    for at in range(0, run.size, _READ):
        size, before = min(_READ, run.size - at), (run.start + at) % PAGE
        pages = -(-(before + size) // PAGE) * PAGE
        if _read_at(handle, buffer[:pages].data, run.start + at - before) < before + size:
            return False
        sums = checksum(buffer[before : before + size])
        if not np.array_equal(sums, run.checksum[at // PAGE :][: len(sums)]):
            return False
    return True


def _open_direct(file: Path) -> int | None:
    """For whole pages that go past the system's cache; None where the file system has no such way:
    it may itself be memory, or want larger units than pages."""
    handle = None
    try:
        handle = os.open(file, os.O_RDWR | os.O_DIRECT)
        os.preadv(handle, [_scratch.empty((PAGE,), np.dtype(np.uint8)).data], 0)
    except OSError as error:
        if handle is not None:
            os.close(handle)
        if error.errno != errno.EINVAL:
            raise
        return None
    return handle


def _read_at(handle: int, view: memoryview, start: int) -> int:
    """Fill `view` as far as the file goes; how far that was."""
    read = 0
    while read < len(view):
        count = os.preadv(handle, [view[read:]], start + read)
        read += count
        if not count or read % PAGE:  # the end, which may lie within a page
            break
    return read


def checksum(values: np.ndarray) -> np.ndarray:
    """The sum, modulo 2 ** 64, of the 8-byte words of each page of a run of bytes.

    Ten times as fast as CRC-32, and sure to see a page that is lost, stale, moved or damaged in one
    place; several changes to one page cancel out with a chance of 2 ** -64.
    """
    whole = values.size - values.size % PAGE
    sums: np.ndarray = values[:whole].view(np.uint64).reshape(-1, PAGE // 8).sum(axis=1)
    if whole == values.size:
        return sums
    rest = np.zeros(PAGE, np.uint8)
    rest[: values.size - whole] = values[whole:]
    return np.append(sums, rest.view(np.uint64).sum())


def _plan(file: str, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> ShardPlan:
    offset = 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # Widest first keeps every tensor aligned to its own items, as the safetensors library does.
    order = sorted(tensors.items(), key=lambda item: -item[1][0].itemsize)
    begins: dict[str, int] = {}
    for name, (dtype, shape) in order:
        begins[name] = offset
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)  # values on whole pages: see `ShardWriter`
    base = 8 + len(text)
    placed = {name: (dtype, shape, base + begins[name]) for name, (dtype, shape) in tensors.items()}
    return ShardPlan(file, len(text).to_bytes(8, "little") + text, placed, base + offset)


def _write_at(handle: int, values: bytes | memoryview, start: int) -> None:
    view = memoryview(values)
    while len(view):
        written = os.pwrite(handle, view, start)  # may be short: 2 GiB a call, or a full disk
        view, start = view[written:], start + written
