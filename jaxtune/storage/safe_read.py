"""Files that strangers made: opened only inside their folder, read with a limit, parsed strictly.

A model folder may come from anywhere. Whatever lies in it, reading it must neither leave it, nor
hang, nor take more memory than it has bytes, nor fail with anything but a `ModelError`.

A symbolic link is followed when it ends in the same folder, or in the blobs of a Hugging Face cache
that the folder is a snapshot of. Every other link is refused: it could name any file of the reader.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtune.config import ModelError

MAX_TEXT = 16_000_000  # bytes of a config; the largest real ones have some ten thousand
MAX_TABLE = 200_000_000  # bytes of a tokenizer or an index of tensors
_MOST_REPEATS, _LONGEST_PATTERN = 4, 1000  # of a regular expression
_STORE_MARK = ".huggingface-shared-blobs"


def open_inside(file: Path, folder: Path) -> int:
    """A descriptor of a regular file of `folder`, to read; the caller closes it.

    `ModelError` for a link that leaves the folder, and for what is no file (a pipe or a device
    would block or never end). A file that is not there, or not readable, is `ModelError` too.
    """
    try:
        place = file.resolve(strict=True)
        if not any(place.is_relative_to(root) for root in _roots(folder)):
            raise ModelError(
                f"{file}: is a link that leaves its folder, to {place}; such links are not "
                "followed. Put the file itself there."
            )
        handle = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a name with a NUL
        raise ModelError(f"{file}: cannot be opened: {reason(error)}.") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ModelError(f"{file}: expected a file; it is a folder, a pipe or a device.")
    return handle


def read_bytes(file: Path, folder: Path, *, limit: int = MAX_TABLE) -> bytes:
    """Read a file of `folder`; `ModelError` when it has more than `limit` bytes."""
    with open(open_inside(file, folder), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise ModelError(f"{file}: has {size:,} bytes; at most {limit:,} are read.")
        try:
            return stream.read(limit)
        except OSError as error:
            raise ModelError(f"{file}: cannot be read: {reason(error)}.") from None


def read_text(file: Path, folder: Path, *, limit: int = MAX_TABLE) -> str:
    try:
        return read_bytes(file, folder, limit=limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{file}: not UTF-8 at byte {error.start}.") from None


def read_object(file: Path, folder: Path, *, limit: int = MAX_TEXT) -> dict[str, Any]:
    """A JSON object; numbers may be NaN and Infinity, as Python writes them into configs."""
    try:
        values = parse_json(read_bytes(file, folder, limit=limit))
    except ValueError as error:
        raise ModelError(f"{file}: not readable as JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ModelError(f"{file}: expected a JSON object; got a {type(values).__name__}.")
    return values


def parse_json(text: bytes) -> Any:
    """Parse JSON in which no key stands twice; every mistake is a `ValueError`.

    >>> parse_json(b'{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: key 'a' stands there twice
    """
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in values if keys.count(key) > 1)
        raise ValueError(f"key {shown(twice)} stands there twice")
    return values


def shown(name: Any, width: int = 80) -> str:
    """A stranger's text as one short line of printable characters, in quotes."""
    text = repr(str(name))
    return text if len(text) <= width else f"{text[:width]}...'"


def plain(name: str) -> str:
    """Show a harmless text without quotes, as a tensor's name nearly always is."""
    return name if name.isprintable() and 0 < len(name) <= 120 else shown(name)


def some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(plain(name) for name in names[:most])}{more}"


def reason(error: BaseException) -> str:
    """Return an error's text in a line."""
    text = (getattr(error, "strerror", None) or str(error)).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _roots(folder: Path) -> list[Path]:
    """List the folders in which a file of `folder` may really lie.

    A hub cache keeps its files beside its snapshots:

    models--OWNER--NAME/snapshots/COMMIT/file -> ../../blobs/ETAG [-> ../../blobs/xx/HASH]
    """
    here = folder.resolve()
    if here.parent.name != "snapshots":
        return [here]
    repository = here.parent.parent
    store = repository.parent / "blobs"
    shared = [store] if (store / _STORE_MARK).is_file() else []
    return [here, repository / "blobs", *shared]


def is_quick(pattern: str) -> bool:
    """Test if a search for a regular expression in a short text ends soon, whatever the text.

    A group that is repeated may take time that doubles with every letter, and each repeat of a
    letter multiplies it by their number: no such groups, and few repeats.
    """
    repeats = len(re.findall(r"[*+{]", pattern))
    many = repeats > _MOST_REPEATS or len(pattern) > _LONGEST_PATTERN
    return not many and re.search(r"\)[*+{]", pattern) is None
