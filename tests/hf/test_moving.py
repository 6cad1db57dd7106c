"""Moved values are those of a plain assignment, in any order of axes, size and dtype."""

import errno
import math
import mmap
import threading
import time

import ml_dtypes
import numpy as np
import pytest

from jaxtune.hf import transpose
from jaxtune.hf.transpose import PAGE, Scratch, empty, move, run_ahead

ORDERS = [(0, 1), (1, 0), (2, 0, 1), (1, 2, 0), (0, 2, 1), (2, 1, 0), (1, 3, 0, 2), (0, 3, 2, 1)]


@pytest.mark.parametrize("tile", [(8, 8), (24, 16), (256, 512)])
def test_a_move_is_an_assignment(monkeypatch, tile):
    monkeypatch.setattr(transpose, "_TILE", tile)
    rng = np.random.default_rng(0)
    dtypes = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
    for trial in range(80):
        order = ORDERS[trial % len(ORDERS)]
        shape = rng.choice([1, 3, 8, 33, 64, 71], size=len(order))
        source, target = rng.choice(len(dtypes), size=2)
        whole = rng.normal(size=shape + 5).astype(dtypes[source])  # a part of it: strides of more
        values = whole[tuple(slice(2, 2 + n) for n in shape)].transpose(order)
        values.flags.writeable = False
        into = ORDERS[rng.integers(len(ORDERS))]
        into = into if len(into) == len(order) else range(len(order))
        room = np.full(np.array(values.shape)[list(into)] + 2, -1, dtypes[target])
        inside = tuple(slice(1, 1 + values.shape[n]) for n in into)
        move(room[inside].transpose(np.argsort(into)), values)
        expected = np.full_like(room, -1)
        expected[inside] = values.astype(dtypes[target]).transpose(into)
        assert room.tobytes() == expected.tobytes(), (order, shape, values.dtype, room.dtype)


def test_empty_arrays_and_addresses():
    move(np.empty((0, 40), np.float32), np.empty((40, 0), np.float32).T)
    for shape in ((), (3,), (5, 7), (0, 2), (1100, 2000)):  # the last one large
        found = empty(shape, np.dtype(ml_dtypes.bfloat16))
        assert (found.shape, found.dtype) == (shape, ml_dtypes.bfloat16)
        assert found.ctypes.data % 64 == 0 or not found.size
        found[...] = 1  # may be written to


def test_a_system_without_huge_pages_gives_memory_all_the_same(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *advice):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(transpose.mmap, "mmap", Refusing)
    found = empty((1100, 2000), np.dtype(np.float32))
    found[...] = 1
    assert found.ctypes.data % 64 == 0


def test_memory_used_again_begins_where_it_is_asked_to():
    scratch = Scratch()
    for past in (0, 8, PAGE - 2, PAGE, 5 * PAGE + 24):
        found = scratch.empty((300, 70), np.dtype(np.float16), past=past)
        assert (found.ctypes.data - past) % PAGE == 0
        assert found.shape == (300, 70)
        found[...] = 1
    kept = scratch.empty((300, 70), np.dtype(np.float16))
    assert np.shares_memory(kept, scratch.empty((4, 4), np.dtype(np.float32)))


@pytest.mark.parametrize("shape", [(3, 500, 300), (300, 2, 9, 20), (40, 30, 20, 10)])
def test_a_tile_is_what_a_move_holds(shape, monkeypatch):
    """Of one large matrix as of many small ones."""
    held, turn, most = [], transpose._turn, math.prod(transpose._TILE)
    monkeypatch.setattr(transpose, "_turn", lambda t, v: (held.append(v.size), turn(t, v)))
    values = np.arange(math.prod(shape), dtype=np.float32).reshape(shape).swapaxes(-1, -2)
    target = np.empty(values.shape, np.float32)
    move(target, values)
    np.testing.assert_array_equal(target, values)
    assert sum(held) == values.size
    assert max(held) <= most


def test_every_order_goes_by_tiles(monkeypatch):
    """Whichever axis of the target is the contiguous one, if it is not the source's."""
    tiled = []
    monkeypatch.setattr(transpose, "_by_tiles", lambda t, v: tiled.append((t.strides, v.strides)))
    across, along = np.empty((30, 40), np.float32), np.empty((40, 30), np.float32).T
    move(across, along)
    move(along, across)
    assert tiled == [((160, 4), (4, 120)), ((120, 4), (4, 160))]


def test_a_few_items_ahead_in_order_and_none_after_an_error():
    running, most, begun, lock = 0, 0, [], threading.Lock()

    def work(n: int) -> int:
        nonlocal running, most
        with lock:
            begun.append(n)
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= 1
        if n == 20:
            raise OSError("disk full")
        return n * n

    assert list(run_ahead(work, range(20))) == [n * n for n in range(20)]
    assert most <= 4
    begun.clear()
    with pytest.raises(OSError, match="disk full"):
        list(run_ahead(work, range(1000)))
    assert max(begun) <= 20 + 5
