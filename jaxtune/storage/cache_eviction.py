"""Eviction from the cache of fetched folders: beyond a bound the one used longest ago goes first.

A folder that a living process reads stays: each process holds a lock on `FOLDER.used` beside it,
which ends with the process, and whose time is that of the last use. Knows no stores.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from jaxtune.config import ConfigError

_VARIABLE = "JAXTUNE_CACHE_GB"
_GOING = ".going-"
_held: dict[Path, int] = {}  # folder -> the file that is locked as long as this process lives


class _Cached(NamedTuple):
    folder: Path
    size: int
    used: float


def limit(place: Path) -> float:
    """Bytes that all cached folders may take: JAXTUNE_CACHE_GB, else half of the disk of `place`.
    Raises `ConfigError`."""
    setting = os.environ.get(_VARIABLE)
    if not setting:
        return shutil.disk_usage(place).total / 2
    try:
        size = float(setting)
    except ValueError:
        size = math.nan
    if not size >= 0:
        raise ConfigError(
            f"{_VARIABLE} is '{setting}'; expected gigabytes, such as 200, that what is fetched "
            "may take."
        )
    return size * 1e9


def use(folder: Path) -> None:
    """Mark `folder` as used now, by this process until it ends."""
    mark = _mark(folder)
    mark.parent.mkdir(parents=True, exist_ok=True)
    while folder not in _held:
        file = os.open(mark, os.O_CREAT | os.O_RDWR, 0o644)
        with contextlib.suppress(OSError):  # a disk without locks: nothing is removed there
            fcntl.flock(file, fcntl.LOCK_SH)
        if _is_still(file, mark):
            _held[folder] = file
        else:  # it went while we waited for the lock
            os.close(file)
    os.utime(_held[folder])


def evict(needed: int, places: Iterable[Path]) -> None:
    """Remove folders of `places` until `needed` more bytes are within the limit, or all that is
    left is in use. Raises `ConfigError` for a limit that is no number."""
    there = [place for place in places if place.is_dir()]
    if not there:
        return
    cached = [folder for place in there for folder in _cached(place)]
    over = sum(each.size for each in cached) + needed - limit(there[0])
    for each in sorted(cached, key=lambda each: each.used):
        if over <= 0:
            return
        if _removed(each.folder):
            over -= each.size


def _cached(place: Path) -> list[_Cached]:
    cached = []
    for folder in place.iterdir():
        if folder.name.startswith(_GOING):  # of a process that was killed
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.is_dir():
            mark = _mark(folder)
            try:
                used = (mark if mark.exists() else folder).stat().st_mtime
            except FileNotFoundError:  # another process removes it
                continue
            cached.append(_Cached(folder, _size(folder), used))
    return cached


def _size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _removed(folder: Path) -> bool:
    """Remove `folder` if no process uses it; never leaves half of it under its name."""
    mark = _mark(folder)
    file = os.open(mark, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder in _held or not _is_still(file, mark):
            return False
        going = folder.with_name(f"{_GOING}{os.getpid()}-{folder.name}")
        os.replace(folder, going)
        mark.unlink()
    except OSError:  # in use, or another process was first
        return False
    finally:
        os.close(file)
    shutil.rmtree(going, ignore_errors=True)
    return True


def _is_still(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _mark(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.used")
