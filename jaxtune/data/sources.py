"""Files -> records. Knows bytes, lines and JSON; knows nothing of what a record means.

JSON is read as Python objects, never through Arrow, so no missing key turns into a null. Every
record comes with the line it starts on, and a file that cannot be read says on which line.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from jaxtune.config import ConfigError, DataError

SUFFIXES = (".json", ".jsonl")


class Record(NamedTuple):
    line: int  # of the file, from 1; where the object starts
    fields: dict[str, Any]


def check(path: str) -> Path:
    """The file at `path`, or the error that says why it cannot be a source."""
    file = Path(path).expanduser()
    suffixes = file.suffixes[-2:]
    kind = suffixes[0] if suffixes[-1:] == [".gz"] and len(suffixes) == 2 else file.suffix
    if file.is_dir() or any(letter in path for letter in "*?"):
        raise ConfigError(f"{path}: a data source is one file. List its files under datasets.")
    if kind not in SUFFIXES:
        raise ConfigError(
            f"{path}: cannot read {kind or 'a name without suffix'!r}. "
            "Data files are .json (a list of objects) or .jsonl (one object per line), or .gz."
        )
    if not file.exists():
        raise DataError(f"{path}: no such file (looked in {Path.cwd()}).")
    return file


def digest(path: Path) -> str:
    """SHA-256 of the file's bytes."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None


def read(path: Path) -> Iterator[Record]:
    """Yields the records in file order: of a JSON list, or of one object per line.

    Which of the two is decided by the first character, not by the suffix. Raises `DataError` at
    the first thing that is not an object, with file and line.
    """
    try:
        with _open(path) as file:
            first = _first_character(file)
            file.seek(0)
            if first == b"":
                raise DataError(f"{path}: the file is empty. Expected JSON objects.")
            yield from _read_list(path, file) if first == b"[" else _read_lines(path, file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}.") from None


def _open(path: Path) -> IO[bytes]:
    open_file: Any = gzip.open if path.suffix == ".gz" else open
    return cast(IO[bytes], open_file(path, "rb"))


BOM = b"\xef\xbb\xbf"  # what Windows editors put before UTF-8


def _first_character(file: IO[bytes]) -> bytes:
    for line in file:
        stripped = line.removeprefix(BOM).strip()
        if stripped:
            return stripped[:1]
    return b""


def _read_lines(path: Path, file: IO[bytes]) -> Iterator[Record]:
    for number, line in enumerate(file, 1):
        text = _text(path, line.removeprefix(BOM) if number == 1 else line, number)
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _broken(path, number, error, "Expected one object per line.") from None
        yield _record(path, number, value)


def _read_list(path: Path, file: IO[bytes]) -> Iterator[Record]:
    text = _text(path, file.read().removeprefix(BOM), 1)
    decoder = json.JSONDecoder()
    position = _skip(text, text.index("[") + 1)
    line, counted = 1, 0
    if text[position : position + 1] == "]":
        raise DataError(f"{path}: the list is empty. Expected JSON objects.")
    while True:
        try:
            line, counted = line + text.count("\n", counted, position), position
            value, position = decoder.raw_decode(text, position)
            yield _record(path, line, value)
            position = _skip(text, position)
            if text[position : position + 1] == "]":
                break
            if text[position : position + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
            position = _skip(text, position + 1)
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError):
                line = error.lineno
            raise _broken(path, line, error, "Expected a list of objects.") from None
    end = _skip(text, position + 1)
    if end < len(text):
        number = text.count("\n", 0, end) + 1
        raise DataError(f"{path}:{number}: text after the end of the list. Remove it.")


def _skip(text: str, position: int) -> int:
    """The next position that is not JSON's white space."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _text(path: Path, data: bytes, line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        number = line + data.count(b"\n", 0, error.start)
        raise DataError(f"{path}:{number}: not UTF-8 text: {error.reason}.") from None


def _record(path: Path, line: int, value: Any) -> Record:
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise DataError(f"{path}:{line}: expected a JSON object {{...}}; got a {kind}.")
    return Record(line, value)


def _broken(path: Path, line: int, error: Exception, expected: str) -> DataError:
    reason = str(error) or "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} (column {error.colno})"
    return DataError(f"{path}:{line}: not valid JSON: {reason}. {expected}")
