"""Values from one order of axes to another on the host, fast: the bulk of importing and exporting.

A transposed copy of a large matrix, element by element, misses the cache at each of them. Here it
goes by tiles that a cache line fills whole, first into a small buffer, then out of it. numpy only.
"""

import collections
import concurrent.futures
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

A = TypeVar("A")
B = TypeVar("B")

_ALONG = 32  # values of a tile that lie together in the source: two cache lines of float32
_ACROSS = 8  # as many lines as a first-level cache holds at one place, where strides are 2 ** n
_BUFFER = 1 << 16  # values that are under way at a time: they and their copy stay in the cache


def move(target: np.ndarray, values: np.ndarray) -> None:
    """`target[...] = values`, of equal shapes, in any strides and dtypes; the cast is numpy's.

    Two to four times as fast as that line where the axis that is contiguous in `values` is not the
    one that is contiguous in `target`. Holds no more than `_BUFFER` values, twice.
    """
    last = target.ndim - 1
    strides = {n: abs(values.strides[n]) for n in range(last + 1) if values.shape[n] > 1}
    fast = min(strides, key=lambda n: strides[n], default=last)
    if fast == last or values.shape[fast] < _ALONG or values.shape[last] < _ACROSS:
        np.copyto(target, values, casting="unsafe")
        return
    values, target = np.moveaxis(values, fast, -2), np.moveaxis(target, fast, -2)
    if values.ndim > 2 and values.shape[-1] * values.shape[-2] > _BUFFER:
        for place in np.ndindex(values.shape[:-2]):
            _by_tiles(target[place], values[place])
        return
    _by_tiles(target, values)


def empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """`np.empty` at an address that JAX's CPU devices take over as it is: a multiple of 64."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


class Scratch(threading.local):
    """Memory of each thread's own that is kept between uses: fresh pages cost the system more than
    filling them."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def empty(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """As `np.empty`, until the same thread asks again."""
        size = math.prod(shape) * dtype.itemsize
        if self._bytes.size < size:
            self._bytes = empty((size,), np.dtype(np.uint8))
        return self._bytes[:size].view(dtype).reshape(shape)


def run_ahead(do: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """`map(do, items)` on a few threads, at most one item each ahead of what has been taken.

    numpy, checksums and files all work without the interpreter's lock. An error comes where its
    result would have; nothing is begun after it.
    """
    count = min(4, os.cpu_count() or 1)
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
    whole, end = columns - columns % _ACROSS, rows - rows % _ALONG
    np.copyto(target[..., whole:], values[..., whole:], casting="unsafe")
    np.copyto(target[..., end:, :whole], values[..., end:, :whole], casting="unsafe")
    step = max(1, _BUFFER // (_ALONG * max(1, whole * math.prod(others)))) * _ALONG
    for start in range(0, end, step):
        cut = (..., slice(start, min(start + step, end)), slice(0, whole))
        tiles = _tiles(values[cut])
        buffer = np.empty(tiles.shape, values.dtype)
        np.copyto(buffer, tiles)
        np.copyto(_tiles(target[cut]), buffer.astype(target.dtype, copy=False))


def _tiles(values: np.ndarray) -> np.ndarray:
    """[..., rows, columns] -> a view [..., tiles of rows, tiles of columns, _ALONG, _ACROSS].

    Of any strides, which `reshape` would copy.
    """
    *others, rows, columns = values.shape
    *outer, row, column = values.strides
    return np.lib.stride_tricks.as_strided(
        values,
        (*others, rows // _ALONG, columns // _ACROSS, _ALONG, _ACROSS),
        (*outer, row * _ALONG, column * _ACROSS, row, column),
    )
