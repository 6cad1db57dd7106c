"""Other processes: the same results in the same order, errors in place, nobody left behind."""

from __future__ import annotations

import functools
import operator
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from jaxtune.config import DataError
from jaxtune.data.workers import in_order


def children() -> set[str]:
    found = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    return set(found.read_text().split()) if found.exists() else set()


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 4, 30])
def test_results_and_order_do_not_depend_on_the_number(processes: int, count: int) -> None:
    work = functools.partial(operator.mul, 3)
    found = in_order(work, range(count), processes, alone=2)
    assert list(found) == [3 * i for i in range(count)]


def test_few_items_start_nobody() -> None:
    assert set(in_order(_process, range(4), 4)) == {os.getpid()}


def _process(item: int) -> int:
    return os.getpid()


def test_an_error_comes_in_its_place_and_ends_everyone() -> None:
    before = children()
    found = in_order(functools.partial(int, base=10), iter(["1", "2", "x", "4"] * 9), 2, alone=0)
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(ValueError, match="invalid literal"):
        next(found)
    assert children() == before


def test_a_reader_that_leaves_ends_everyone() -> None:
    before = children()
    found = in_order(abs, range(10**9), 2, alone=0)
    assert next(found) == 0
    assert len(children() - before) == (2 if Path("/proc/self/task").exists() else 0)
    found.close()
    assert children() == before


def test_a_process_that_dies_is_explained() -> None:
    with pytest.raises(DataError, match=r"ended early \(exit 3\).*Set dataset_num_proc lower"):
        list(in_order(os._exit, [3] * 5, 2, alone=0))


def test_an_error_that_cannot_travel_is_told() -> None:
    code = "import json, jaxtune.data.workers as w\nlist(w.in_order(json.loads, ['{'], 2, alone=0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "JSONDecodeError" in done.stderr  # its constructor takes more than a message
    assert "Expecting property name" in done.stderr


def test_an_unguarded_script_and_what_it_prints(tmp_path: Path) -> None:
    """The main module is not run again, and prints of the work do not reach the answers."""
    script = tmp_path / "script.py"
    script.write_text(
        "from jaxtune.data.workers import in_order\n"
        "print('main')\n"
        "print(list(in_order(print, ['hello'] * 3, 2, alone=0)))\n"
    )
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.stdout == "main\n[None, None, None]\n"
    assert done.stderr.count("hello") == 3
