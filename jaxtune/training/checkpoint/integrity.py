"""Digests of the files in a folder: written when they are complete, compared before they are read.

Orbax writes a checkpoint whole or not at all, but reads a flipped bit as if it were a number. Each
host hashes its share of the files into `digests-HOST.json`; a folder without all of these was never
finished. Hosts that share no folder each hash what they wrote, and the parts meet in a store.

Damage is what is missing, or has another size or hash. A file that cannot be read (a disk or a
mount that fails, permissions, too many open files) says nothing of what was written.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, PositiveInt

from jaxtune.config import ConfigError
from jaxtune.storage.atomic_write import write_whole

FOLDER = "checkpoints"  # of a run directory
MARK = "digests-0.json"  # a step without it was never finished
UNFINISHED = "it was never finished: its digests are missing"
OTHER_BYTES = "its bytes are not those that were written (SHA-256 differs)"
_THREADS = 8  # hashing lets go of the interpreter
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

Known = Mapping[str, tuple[int, str]]  # file -> (size in bytes, SHA-256)


class _Digests(BaseModel):
    """A file of digests, by one of `hosts`."""

    hosts: PositiveInt
    files: dict[str, tuple[int, str]]


def write(
    folder: Path, *, host: int = 0, hosts: int = 1, names: Sequence[str] | None = None
) -> None:
    """Write this host's share: sizes in bytes and SHA-256 of the files `names` under `folder`.

    Without `names`, of every file there that falls to this host.
    """
    files = files_of(folder)[host::hosts] if names is None else names
    digests = dict(zip(files, _digests(folder, files), strict=True))
    write_whole(folder / mark_of(host), json.dumps({"hosts": hosts, "files": digests}))


def complete(folder: Path) -> bool:
    """Return True if every host has written its share, readable or not."""
    try:
        return bool(_parts(folder))
    except (ValueError, OSError):
        return True


def complete_steps(checkpoints: Path) -> list[int]:
    """List the steps that were finished, damaged since or not."""
    steps = checkpoints.iterdir() if checkpoints.is_dir() else ()
    return [int(path.name) for path in steps if path.name.isdigit() and complete(path)]


def verify(folder: Path, *, host: int = 0, hosts: int = 1) -> str:
    """Describe, for a person, the first file that is not as written; empty where all is well.

    Looks at this host's share of the files; hosts need not be those of the writing. Raises
    `ConfigError` for a file that cannot be read.
    """
    try:
        entries = known(folder)
    except ValueError as error:
        return str(error)
    if not entries:
        return UNFINISHED
    with _readable(folder):
        return _unlike_known(folder, entries, sorted(entries)[host::hosts])


def _unlike_known(folder: Path, entries: Known, hashed: Sequence[str]) -> str:
    """Describe the first file that is missing, new, of another size, or, if `hashed`, of other
    bytes."""
    if new := sorted(set(files_of(folder)) - entries.keys()):
        return f"{new[0]}: is not one of its files"
    for name, (size, _) in sorted(entries.items()):
        try:
            now = (folder / name).stat().st_size
        except _MISSING as error:
            return f"{name}: {error.strerror}"
        if now != size:
            return f"{name}: has {now:,} bytes instead of {size:,}"
    try:
        for name, (_, digest) in zip(hashed, _digests(folder, hashed), strict=True):
            if digest != entries[name][1]:
                return f"{name}: {OTHER_BYTES}"
    except _MISSING as error:  # a moment ago it was there
        return f"{error.filename}: {error.strerror}"
    return ""


def known(folder: Path) -> Known:
    """Read the digests that all hosts wrote; empty where they were never finished.

    Raises `ValueError` for a file that is no digests, `ConfigError` for one that cannot be read.
    """
    with _readable(folder):
        return {name: entry for part in _parts(folder) for name, entry in part.items()}


def unlike(folder: Path, names: Sequence[str], known: Known) -> list[str]:
    """Return those of `names` that are not there, or not as they were written.

    Raises `ConfigError` for one that cannot be read.
    """
    with _readable(folder):
        there = [name for name in names if (folder / name).is_file()]
        now = dict(zip(there, _digests(folder, there), strict=True))
    return [name for name in names if now.get(name) != tuple(known[name])]


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{error.filename or folder}: cannot be read: {error.strerror}. That says nothing of "
            "what was written, so nothing is changed. Mend the disk, the mount, the permissions or "
            "the limit of open files, then run the same command again."
        ) from error


def is_mark(name: str) -> bool:
    return "/" not in name and name.startswith("digests-")


def mark_of(host: int) -> str:
    return f"digests-{host}.json"


def _parts(folder: Path) -> list[Known]:
    """Read the digests that each host wrote; empty when one host's are missing.

    Raises `ValueError` for a file that is no digests.
    """
    parts: list[Known] = []
    hosts = 1
    while len(parts) < hosts:
        name = mark_of(len(parts))
        try:
            part = _Digests.model_validate_json((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
        except (*_MISSING, ValueError):  # of the file, and of pydantic
            raise ValueError(f"{name}: cannot be read") from None
        hosts = part.hosts
        parts.append(part.files)
    return parts


def files_of(folder: Path) -> list[str]:
    """Names of all files under `folder`, sorted, without the digests themselves."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        path.as_posix() for path in paths if path.parts[1:] or not path.match("digests-*")
    )


def _digests(folder: Path, files: Iterable[str]) -> list[tuple[int, str]]:
    def of(name: str) -> tuple[int, str]:
        try:
            with (folder / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                return file.tell(), digest
        except OSError as error:  # one of reading has no name
            raise OSError(error.errno, error.strerror, str(folder / name)) from None

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(of, files))
