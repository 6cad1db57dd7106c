"""Work in other processes, its results in order. Knows bytes and processes; knows no data.

The processes are new interpreters that speak over pipes: nothing is forked (a process that has
JAX's threads must not be), and the user's main module is not run again in them, so this works from
a notebook or an unguarded script too.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import gc
import itertools
import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Generator, Iterable
from typing import IO, Any, TypeVar

from jaxtune.config import DataError

T = TypeVar("T")
R = TypeVar("R")

_ALONE = 4  # items done here before it is worth starting anyone
_MOST = 16  # processes by default: beyond that, reading the file is the slower part
_START = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from jaxtune.data.workers import serve; serve()"
)


def default_processes() -> int:
    """Return one for each core this process may use, up to 16."""
    usable = getattr(os, "sched_getaffinity", None)
    return min(_MOST, len(usable(0)) if usable else os.cpu_count() or 1)


def in_order(
    work: Callable[[T], R], items: Iterable[T], processes: int, *, alone: int = _ALONE
) -> Generator[R, None, None]:
    """Map `work` over `items`, in `processes` processes if there are more than `alone` items.

    The results do not depend on `processes`. `work`, items and results are pickled. What `work`
    raises is raised here, at its place in the order. Memory holds two items for each process.
    """
    items = iter(items)
    first = list(itertools.islice(items, alone + 1))
    if processes < 2 or len(first) <= alone or not sys.executable:
        yield from map(work, itertools.chain(first, items))
        return
    with contextlib.ExitStack() as closing:
        idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for _ in range(processes):
            process = _Process(work, processes)
            closing.callback(process.close)
            idle.put(process)

        def ask(item: T) -> Any:
            process = idle.get()
            try:
                return process.ask(item)
            finally:
                idle.put(process)

        threads = concurrent.futures.ThreadPoolExecutor(processes)
        closing.callback(threads.shutdown, wait=False, cancel_futures=True)
        waiting: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
        for item in itertools.chain(first, items):
            if len(waiting) == 2 * processes:
                yield waiting.popleft().result()
            waiting.append(threads.submit(ask, item))
        while waiting:
            yield waiting.popleft().result()


class _Process:
    """An interpreter that has `work` and answers items with results."""

    def __init__(self, work: Callable[[Any], Any], processes: int) -> None:
        self._processes = processes
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        # Many short writes: the folders of imports first, then the work, then items.
        self._first = [pickle.dumps(sys.path), pickle.dumps(work, protocol=5)]

    def ask(self, item: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            for message in [*self._first, pickle.dumps(item, protocol=5)]:
                self._process.stdin.write(message)
            self._first = []
            self._process.stdin.flush()
            fine, answer = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = self._process.wait()
            raise DataError(
                f"a process that tokenises ended early (exit {code}); -9 means that memory ran "
                f"out. Set dataset_num_proc lower; it was {self._processes}."
            ) from None
        if not fine:
            raise answer
        return answer

    def close(self) -> None:
        """End the interpreter, also in the middle of an item."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def serve() -> None:
    """Serve the other end: read `work`, then items until there are no more."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the asking process decides when to stop
        signal.signal(number, signal.SIG_IGN)
    gc.set_threshold(100_000)  # rows make many small objects and hardly a cycle
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not get between the answers
    with contextlib.suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):  # it has ended
        work = pickle.load(sys.stdin.buffer)
        while True:
            _answer(work, pickle.load(sys.stdin.buffer), out)


def _answer(work: Callable[[Any], Any], item: Any, out: IO[bytes]) -> None:
    try:
        answer = pickle.dumps((True, work(item)), protocol=5)
    except Exception as error:
        try:
            answer = pickle.dumps((False, error))
            pickle.loads(answer)
        except Exception:  # some exceptions do not survive the way
            answer = pickle.dumps((False, RuntimeError(traceback.format_exc())))
    out.write(answer)
    out.flush()
