"""Moved values are those of a plain assignment, in any order of axes, size and dtype."""

import threading
import time

import ml_dtypes
import numpy as np
import pytest

from jaxtune.hf import moving
from jaxtune.hf.moving import empty, move, run_ahead

ORDERS = [(0, 1), (1, 0), (2, 0, 1), (1, 2, 0), (0, 2, 1), (2, 1, 0), (1, 3, 0, 2), (0, 3, 2, 1)]


@pytest.mark.parametrize("buffer", [1, 300, 1 << 16])
def test_a_move_is_an_assignment(monkeypatch, buffer):
    monkeypatch.setattr(moving, "_BUFFER", buffer)
    rng = np.random.default_rng(0)
    dtypes = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
    for trial in range(80):
        order = ORDERS[trial % len(ORDERS)]
        shape = rng.choice([1, 3, 8, 33, 64, 71], size=len(order))
        source, target = rng.choice(len(dtypes), size=2)
        whole = rng.normal(size=shape + 5).astype(dtypes[source])  # a part of it: strides of more
        values = whole[tuple(slice(2, 2 + n) for n in shape)].transpose(order)
        values.flags.writeable = False
        room = np.full(np.array(values.shape) + 2, -1, dtypes[target])
        inside = tuple(slice(1, 1 + n) for n in values.shape)
        move(room[inside], values)
        expected = np.full_like(room, -1)
        expected[inside] = values.astype(dtypes[target])
        assert room.tobytes() == expected.tobytes(), (order, shape, values.dtype, room.dtype)


def test_empty_arrays_and_addresses():
    move(np.empty((0, 40), np.float32), np.empty((40, 0), np.float32).T)
    for shape in ((), (3,), (5, 7), (0, 2)):
        found = empty(shape, np.dtype(ml_dtypes.bfloat16))
        assert (found.shape, found.dtype) == (shape, ml_dtypes.bfloat16)
        assert found.ctypes.data % 64 == 0 or not found.size


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
