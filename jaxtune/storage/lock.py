"""A folder that one run at a time writes to: a lock on a file in it, which ends with its process.

Programs that a run starts do not have it, and forked children let go of it at once. Where the file
system has no locks nobody is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxtune.config import ConfigError

NAME = ".lock"
_ENDING_SECONDS = 10.0  # a process that was killed gives back its memory first
_ELSEWHERE_SECONDS = 120.0  # a machine that was lost holds it until its file server notices
_LOOK_SECONDS = 0.2
_held: set[int] = set()  # files that are locked


@contextlib.contextmanager
def held(folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of `folder`, which exists.

    Another holder has a moment to end, as it needs when it was killed; then raises `ConfigError`.
    """
    try:
        file = os.open(folder / NAME, os.O_CREAT | os.O_RDWR, 0o666)
    except OSError:  # another user's
        yield
        return
    _once()
    _held.add(file)
    try:
        _lock(file, folder, note)
        yield
    finally:
        if file in _held:  # not in a forked child
            _held.discard(file)
            os.close(file)


def _lock(file: int, folder: Path, note: Callable[[str], None]) -> None:
    began, noted = time.monotonic(), False
    while not _locked(file):
        holder, machine = _holder(file)
        here = machine in ("", platform.node())
        limit = _ENDING_SECONDS if here else _ELSEWHERE_SECONDS
        if time.monotonic() - began > limit:
            raise ConfigError(
                f"output_dir {folder}: {holder} is writing there: it holds {folder / NAME}. Two "
                "runs would remove each other's checkpoints. Wait for it or end it, or choose "
                "another output_dir."
            )
        if not noted:
            note(f"output_dir {folder}: {holder} is writing there; waiting {limit:g} s for its end")
            noted = True
        time.sleep(_LOOK_SECONDS)


def _locked(file: int) -> bool:
    """Take the lock; False if another process holds it, as far as the file system can say."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    with contextlib.suppress(OSError):  # a full disk
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()} {platform.node()}".encode(), 0)
    return True


def _holder(file: int) -> tuple[str, str]:
    """Read which process holds it, and on which machine."""
    try:
        process, _, machine = os.pread(file, 300, 0).decode(errors="replace").partition(" ")
    except OSError:
        process = machine = ""
    where = f" on {machine}" if machine else ""
    return (f"process {process}{where}" if process else "another process"), machine


@functools.cache
def _once() -> None:
    os.register_at_fork(after_in_child=_let_go)


def _let_go() -> None:
    for file in _held:
        with contextlib.suppress(OSError):
            os.close(file)
    _held.clear()
