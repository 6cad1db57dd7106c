"""Readers: file -> records. Knows bytes, lines and tables; knows nothing of what a record means.

JSON is read as Python objects, never through Arrow, so no missing key turns into a null. Files are
read as a stream: memory holds a record or a block, never the file. Every record comes with the line
it starts on (in a table: its row), and a file that cannot be read says where.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import importlib
import itertools
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from jaxtune.config import ConfigError, DataError
from jaxtune.storage import object_store

# The file that `in_memory.dataset_file` writes; its path would tell a caller nothing.
_IN_MEMORY = re.compile(rf"\b{object_store.IN_MEMORY}[/\\][0-9a-f]{{32}}[/\\]data\.jsonl$")


class File(NamedTuple):
    """A file to read; `name` is what errors call it, and says the kind if the path does not.

    >>> File(Path("blobs/3f2a"), "hub/data/train.jsonl.gz").kind
    '.jsonl'
    """

    path: Path
    name: str

    @property
    def zipped(self) -> bool:
        return self.name.lower().endswith(".gz")

    @property
    def kind(self) -> str:
        """Return the suffix before `.gz`, in lower case."""
        return Path(self.name.lower().removesuffix(".gz")).suffix


class Record(NamedTuple):
    file: str
    line: int  # where it starts in the file, from 1; in a table its row
    fields: dict[str, Any]

    @property
    def where(self) -> str:
        return location(self.file, self.line)


def location(file: str, line: int) -> str:
    """Name a record's place: the file and its line; of rows in memory, `data` and their index.

    >>> location("train.jsonl", 3)
    'train.jsonl:3'
    """
    in_memory = file.endswith(".jsonl") and _IN_MEMORY.search(file)
    return f"data[{line - 1}]" if in_memory else f"{file}:{line}"


class EmptyError(DataError):
    """A file that holds no record."""


def read(file: File) -> Iterator[Record]:
    """Yield the records of a file in order. Raises `DataError` at the first thing that is none."""
    empty = True
    try:
        with contextlib.closing(READERS[file.kind](file)) as found:
            for line, fields in found:
                empty = False
                yield Record(file.name, line, fields)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file.name}: cannot be read: {error}.") from None
    if empty:
        raise EmptyError(f"{file.name}: the file is empty: there is nothing to train in it.")


Found = Iterator[tuple[int, dict[str, Any]]]


def _open(file: File) -> IO[bytes]:
    open_file: Any = gzip.open if file.zipped else open
    return cast(IO[bytes], open_file(file.path, "rb"))


# -- lines ----------------------------------------------------------------------------------------

BOM = b"\xef\xbb\xbf"  # what Windows editors put before UTF-8


def _lines(file: File, stream: IO[bytes]) -> Iterator[str]:
    """Yield the lines with their ends, cut at line feeds alone: U+2028 is text."""
    for number, line in enumerate(stream, 1):
        try:
            yield (line.removeprefix(BOM) if number == 1 else line).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(file.name, number, error) from None


def _not_utf8(name: str, line: int, error: UnicodeDecodeError) -> DataError:
    utf16 = error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "UTF-16" if utf16 else "LATIN1"
    return DataError(
        f"{name}:{line}: not UTF-8 text: {error.reason}. Save it as UTF-8; of a file in "
        f"{encoding}: iconv -f {encoding} -t UTF-8 {name} > NEW"
    )


def _text(file: File) -> Found:
    """Yield documents: what stands between blank lines.

    So a file of any size is a stream of pieces, and one line break within a piece is text. A longer
    text, with blank lines in it, is a row of a .jsonl file.
    """
    start, held = 1, ""
    with _open(file) as stream:
        for number, line in enumerate(_lines(file, stream), 1):
            if line.strip():
                start = start if held else number
                held += line
            elif held:
                yield start, {"text": held.rstrip("\r\n")}
                held = ""
    if held:
        yield start, {"text": held.rstrip("\r\n")}


_DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab"}


def _csv(file: File) -> Found:
    """Yield rows in which every cell is text as it stands; the first line names the columns."""
    csv.field_size_limit(2**31 - 1)  # the default refuses a cell of 128 KiB
    with _open(file) as stream:
        lines = _lines(file, stream)
        leading = list(_until_filled(lines))
        delimiter = _delimiter(leading[-1]) if leading else ","
        if leading and (named := re.fullmatch(r"sep=(.)\s*", leading[-1].removeprefix("\ufeff"))):
            delimiter, leading[-1] = named[1], "\n"  # a line that spreadsheets write and read
        rows = csv.reader(itertools.chain(leading, lines), strict=True, delimiter=delimiter)
        header: list[str] = []
        line = 1
        while True:
            try:
                cells = next(rows, None)
            except csv.Error as error:
                raise DataError(f"{file.name}:{line}: not valid CSV: {error}.") from None
            if cells is None:
                break
            if cells and not header:
                header = cells
                twice = next((name for name in header if header.count(name) > 1), None)
                if twice is not None:
                    raise DataError(f"{file.name}:{line}: two columns are called {twice!r}.")
            elif cells:
                if len(cells) != len(header):
                    raise DataError(
                        f"{file.name}:{line}: {len(cells)} cells, but the header names "
                        f'{len(header)}. Put "..." around a cell that holds '
                        f"{_DELIMITERS[delimiter]}."
                    )
                yield line, dict(zip(header, cells, strict=True))
            line = rows.line_num + 1


def _until_filled(lines: Iterator[str]) -> Iterator[str]:
    """Yield lines up to the first that is not blank."""
    for line in lines:
        yield line
        if line.strip("\r\n"):
            return


def _delimiter(header: str) -> str:
    """Choose the delimiter by the header: a comma, unless only another one makes several columns.

    >>> [_delimiter(line) for line in ("question;answer", "a;b,c", "text", '"a;b"')]
    [';', ',', ',', ',']
    """
    try:
        columns = {d: len(next(csv.reader([header], delimiter=d))) for d in _DELIMITERS}
    except csv.Error:
        return ","  # with which it will be read again, and refused
    return "," if columns[","] > 1 else max(_DELIMITERS, key=columns.__getitem__)


# -- JSON -----------------------------------------------------------------------------------------


def _json(file: File) -> Found:
    """Read a list of objects, or one per line; the first character decides, not the suffix.

    An object whose one key holds the list, `{"data": [...]}`, is read as that list.
    """
    with _open(file) as stream:
        first = b""
        while not first and (block := stream.read(_BLOCK)):
            first = block.removeprefix(BOM).lstrip()[:1]
        stream.seek(0)
        yield from _json_list(file, stream) if first == b"[" else _json_lines(file, stream)


def _json_lines(file: File, stream: IO[bytes]) -> Found:
    lines = ((n, line) for n, line in enumerate(_lines(file, stream), 1) if line.strip())
    first = list(itertools.islice(lines, 2))
    problem = None
    for place, (number, line) in enumerate(itertools.chain(first, lines)):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = _broken(file, number, error, "Expected one object per line.")
            value = None
        if place == 0 and (problem or (len(first) == 1 and isinstance(value, dict))):
            # Objects are longer than a line, or this is the only one: it may wrap the records.
            stream.seek(0)
            if _wraps(file, _Window(file, stream), number, one_line=problem is None):
                stream.seek(0)
                yield from _json_list(file, stream, wrapped=True)
                return
        if problem:
            raise problem
        yield number, _object(file, number, value)


def _json_list(file: File, stream: IO[bytes], *, wrapped: bool = False) -> Found:
    """Read a list, or the only one in an object."""
    window = _Window(file, stream)
    line = 1
    try:
        if wrapped:
            window.key("{")
        window.skip("[")
        if window.peek() == "]":
            raise EmptyError(f"{file.name}: the list is empty. Expected JSON objects.")
        while True:
            window.peek()
            line = window.line()
            yield line, _object(file, line, window.value())
            if window.peek() == "]":
                break
            window.skip(",")
        window.skip("]")
        if wrapped:
            window.skip("}")
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            line, error.colno = window.place(error.pos)
        raise _broken(file, line, error, "Expected a list of objects.") from None
    if window.peek():
        raise DataError(f"{file.name}:{window.line()}: text after the end of the list. Remove it.")


def _wraps(file: File, window: _Window, first_line: int, *, one_line: bool) -> bool:
    """Tell whether the whole file is `{KEY: [records]}`. Raises `DataError` for several such keys.

    On one line, an object with other keys too is a record as any; a conversation always is.
    """
    records: dict[str, int] = {}  # in the list of each key; 0 where it holds none
    try:
        while not records or window.peek() == ",":
            key = window.key("," if records else "{")
            records[key] = _records_in(file, window, first_line)
        window.skip("}")
    except (ValueError, RecursionError):
        return False
    lists = [key for key, count in records.items() if count]
    if window.peek() or not lists or (one_line and len(lists) < len(records)):
        return False
    if len(records) > 1:
        others = len(records) - len(lists)
        raise DataError(
            f"{file.name}: one object, whose keys hold lists of records: "
            f"{', '.join(f'{key} ({records[key]:,})' for key in lists)}"
            f"{f', beside {others} other' if others else ''}. Expected records, or one list of "
            f"them. Save the list to train on by itself: jq '.{lists[0]}' {file.name} > "
            f"{lists[0]}.json"
        )
    return True


def _records_in(file: File, window: _Window, first_line: int) -> int:
    """Count the objects of a list that are no messages; 0 for any other value."""
    if window.peek() != "[":
        window.value()
        return 0
    window.skip("[")
    window.peek()
    # Lines that are elements of a list are no records by themselves: a mistake is of the list.
    apart = window.line() > first_line
    count, records = 0, True
    try:
        while window.peek() != "]":
            line, value = window.line(), window.value()
            if apart and count and records:
                _object(file, line, value)
            records = records and isinstance(value, dict) and not {"role", "from"} & value.keys()
            count += 1
            if window.peek() != "]":
                window.skip(",")
        window.skip("]")
    except json.JSONDecodeError as error:
        if not apart:
            raise
        line, error.colno = window.place(error.pos)
        raise _broken(file, line, error, "Expected a list of objects.") from None
    return count if records else 0


_BLOCK = 1 << 18  # bytes read at once
_BLANKS = re.compile(r"[ \t\r\n]*")
_UNSURE = 16  # characters: the longest thing that, cut by the end of a block, reads as a mistake


class _Window:
    """A JSON file's text from `position` on, as far as it was needed; the rest is let go."""

    def __init__(self, file: File, stream: IO[bytes]) -> None:
        self._name = file.name
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text = ""
        self._position = 0
        self._line, self._counted = 1, 0  # the line of the character `_counted`
        self._before = 0  # characters of the first line that are let go already

    def line(self) -> int:
        """Return the line of `position`, from 1; counts on from the last call."""
        self._line += self._text.count("\n", self._counted, self._position)
        self._counted = self._position
        return self._line

    def place(self, position: int) -> tuple[int, int]:
        """Return (line, column) of a position that is not before the last counted one, from 1."""
        line_start = self._text.rfind("\n", 0, position) + 1
        column = position - line_start + 1 + (0 if line_start else self._before)
        return self._line + self._text.count("\n", self._counted, position), column

    def peek(self) -> str:
        """Return the next character that is not a blank; "" at the end of the file."""
        while True:
            blanks = _BLANKS.match(self._text, self._position)
            self._position = blanks.end() if blanks else self._position
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._more():
                return ""

    def skip(self, expected: str) -> None:
        if self.peek() != expected:
            either = "',' or ']'" if expected == "," else f"'{expected}'"
            raise json.JSONDecodeError(f"Expecting {either}", self._text, self._position)
        self._position += 1

    def key(self, before: str) -> str:
        """Parse `before`, a key of an object and its colon."""
        self.skip(before)
        self.peek()
        key = self.value()
        if not isinstance(key, str):
            raise json.JSONDecodeError("Expecting a key", self._text, self._position)
        self.skip(":")
        self.peek()
        return key

    def value(self) -> Any:
        """Parse the value that starts at `position`, read on until it is whole."""
        while True:
            try:
                value, self._position = self._json.raw_decode(self._text, self._position)
                return value
            except json.JSONDecodeError as error:
                cut = error.pos > len(self._text) - _UNSURE or error.msg.startswith("Unterminated")
                if not cut or not self._more():
                    raise

    def _more(self) -> bool:
        """Let go of what is done and read at least as much as is left; False at the end."""
        self.line()
        _, column = self.place(self._position)
        self._text, self._before = self._text[self._position :], column - 1
        self._position = self._counted = 0
        data = self._stream.read(max(_BLOCK, len(self._text)))
        try:
            self._text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line, _ = self.place(len(self._text))
            line += error.object.count(b"\n", 0, error.start)
            raise _not_utf8(self._name, line, error) from None
        return bool(data)


def _object(file: File, line: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise DataError(f"{file.name}:{line}: expected a JSON object {{...}}; got a {kind}.")
    return value


def _broken(file: File, line: int, error: Exception, expected: str) -> DataError:
    reason = str(error) or "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} (column {error.colno})"
    return DataError(f"{file.name}:{line}: not valid JSON: {reason}. {expected}")


# -- tables ---------------------------------------------------------------------------------------

_ROWS = 1000  # turned into Python objects at once


def needed(module: str, extra: str, what: str) -> Any:
    """Import an optional library, or raise with the line that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise ConfigError(f"{what} needs {package}. Run: pip install 'jaxtune[{extra}]'") from None


def _parquet(file: File) -> Found:
    parquet = needed("pyarrow.parquet", "parquet", f"{file.name}: a parquet file")
    with _seekable(file) as stream, _arrow_errors(file, "parquet"):
        yield from _rows(parquet.ParquetFile(stream).iter_batches(_ROWS))


def _arrow(file: File) -> Found:
    ipc = needed("pyarrow.ipc", "parquet", f"{file.name}: an arrow file")
    with _seekable(file) as stream, _arrow_errors(file, "arrow"):
        yield from _rows(ipc.open_stream(stream))


def _rows(batches: Any) -> Found:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS):
            for fields in batch.slice(start, _ROWS).to_pylist():
                number += 1
                yield number, {name: without_nulls(value) for name, value in fields.items()}


def without_nulls(value: Any) -> Any:
    """Drop the keys inside a table's value that are null: there every row has the keys of all.

    >>> without_nulls([{"name": "add", "arguments": {"a": 2, "b": None}}])
    [{'name': 'add', 'arguments': {'a': 2}}]
    """
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if not isinstance(value, list):
        return value
    kind = next((inner for inner in value if inner is not None), None)  # a table's lists have one
    return [without_nulls(inner) for inner in value] if isinstance(kind, dict | list) else value


@contextlib.contextmanager
def _seekable(file: File) -> Iterator[IO[bytes]]:
    """Open the bytes for random access: a .gz is unpacked into a file without a name."""
    with _open(file) as stream:
        if not file.zipped:
            yield stream
            return
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(stream, unpacked)
            unpacked.seek(0)
            yield unpacked


@contextlib.contextmanager
def _arrow_errors(file: File, kind: str) -> Iterator[None]:
    arrow = importlib.import_module("pyarrow")
    try:
        yield
    # Values that Python cannot hold (text that is not UTF-8, dates beyond its years) are the rest.
    except (arrow.ArrowException, ValueError, ArithmeticError, LookupError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(f"{file.name}: not a readable {kind} file: {reason}.") from None


READERS: dict[str, Callable[[File], Any]] = {
    ".json": _json,
    ".jsonl": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _text,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
