"""Values from one order of axes to another on the host, fast: the bulk of importing and exporting.

A transposed copy of a large matrix, element by element, misses the cache at each of them. Here it
goes by tiles: runs of the source into a small buffer, then runs of the target out of it. numpy
only.
"""

import collections
import concurrent.futures
import contextlib
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

A = TypeVar("A")
B = TypeVar("B")

PAGE = 4096  # bytes; what memory comes in, and what disks read and write
_HUGE = 1 << 21  # bytes; a huge page
_TILE = (256, 512)  # runs of the source and of the target, in values: it stays in a core's cache
_LINE = 64  # bytes between the rows of a tile: no row at the cache's own distance of the next
_FEW = 8  # runs of fewer values are not worth a second copy


def move(target: np.ndarray, values: np.ndarray) -> None:
    """`target[...] = values`, of equal shapes, in any strides and dtypes; the cast is numpy's.

    Several times as fast as that line where the axis that is contiguous in `values` is not the one
    that is contiguous in `target`. Holds a `_TILE` of values.
    """
    if target.dtype == values.dtype:  # numbers of other libraries are copied one by one
        same = np.dtype(f"u{values.itemsize}")
        target, values = target.view(same), values.view(same)
    run, fast = _contiguous(target), _contiguous(values)
    if fast == run or min(values.shape[fast], values.shape[run]) < _FEW:
        np.copyto(target, values, casting="unsafe")
        return
    ends = (-2, -1)
    _by_tiles(np.moveaxis(target, (fast, run), ends), np.moveaxis(values, (fast, run), ends))


def _contiguous(values: np.ndarray) -> int:
    """The axis along which values lie closest together; the last one where there is none."""
    strides = {n: abs(by) for n, by in enumerate(values.strides) if values.shape[n] > 1}
    return min(strides, key=lambda n: strides[n], default=values.ndim - 1)


def empty(shape: Sequence[int], dtype: np.dtype, *, aligned: int = 64) -> np.ndarray:
    """`np.empty` at an address that JAX's CPU devices take over as it is: a multiple of 64.

    Large ones in huge pages from their first byte on, where the system has them: half of what an
    import spends in the system is the first touch of each page.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < 2 * _HUGE:
        raw = np.empty(size + aligned, np.uint8)
    else:
        aligned = max(aligned, _HUGE)
        memory = mmap.mmap(-1, size + aligned, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(AttributeError, OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        raw = np.frombuffer(memory, np.uint8)
    start = -raw.ctypes.data % aligned
    return raw[start : start + size].view(dtype).reshape(shape)


class Scratch(threading.local):
    """Memory of each thread's own that is kept between uses: fresh pages cost the system more than
    filling them."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def empty(self, shape: Sequence[int], dtype: np.dtype, *, past: int = 0) -> np.ndarray:
        """As `np.empty`, until the same thread asks again; begins `past` bytes, as far as they are
        no whole pages, behind one."""
        size, first = math.prod(shape) * dtype.itemsize, past % PAGE
        if self._bytes.size < first + size:
            self._bytes = empty((PAGE + size,), np.dtype(np.uint8), aligned=PAGE)
        return self._bytes[first : first + size].view(dtype).reshape(shape)


_tiles = Scratch()


def run_ahead(do: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """`map(do, items)` on a few threads, at most one item each ahead of what has been taken.

    numpy, checksums and files all work without the interpreter's lock. An error comes where its
    result would have; nothing is begun after it.
    """
    count = min(4, 2 * (os.cpu_count() or 1))  # some of them wait for the disk
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        under_way: collections.deque[concurrent.futures.Future[B]] = collections.deque()
        try:
            for item in items:
                under_way.append(pool.submit(do, item))
                if len(under_way) > count:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()


def once(make: Callable[[], B]) -> Callable[[], B]:
    """`make`, called at most once, however many threads ask."""
    lock = threading.Lock()
    made: list[B] = []

    def get() -> B:
        with lock:
            if not made:
                made.append(make())
            return made[0]

    return get


def _by_tiles(target: np.ndarray, values: np.ndarray) -> None:
    """The last axis of `target` is its contiguous one; that of `values` is the one before."""
    *others, rows, columns = values.shape
    if not values.size:
        return
    along, across = _TILE
    part = min(rows, along) * min(columns, across) * math.prod(others[1:])
    step = max(1, along * across // part) if others else 1
    if others and step < others[0]:
        for start in range(0, others[0], step):
            some = slice(start, start + step) if step > 1 else start
            _by_tiles(target[some], values[some])
        return
    for row in range(0, rows, along):
        for column in range(0, columns, across):
            tile = (..., slice(row, row + along), slice(column, column + across))
            _turn(target[tile], values[tile])


def _turn(target: np.ndarray, values: np.ndarray) -> None:
    """Transpose one tile, or a few small ones, into `target`."""
    *others, rows, columns = values.shape
    space = _LINE // target.itemsize
    buffer = _tiles.empty((*others, columns, rows + space), target.dtype)[..., :rows]
    np.copyto(buffer, values.swapaxes(-1, -2), casting="unsafe")
    np.copyto(target, buffer.swapaxes(-1, -2))
