"""One source, from its file to examples: read, format, render, encode, cut to length, count.

The chain itself, used alike by `preview` (which shows every row) and by the cache (which keeps
those that are trained).
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from jaxtune.config import DataError
from jaxtune.data import formats, sources
from jaxtune.data.cache import Writer, code_version
from jaxtune.data.encode import encode, truncate
from jaxtune.data.schema import Conversation, Document, Dropped, Span, Tokens
from jaxtune.data.template import Template, TrainOn, render
from jaxtune.data.tokenizer import Tokenizer

Truncation = Literal["drop", "truncate", "error"]

_CHUNK = 512  # records encoded together: enough for every core, little enough to stream
_SHOWN = 3  # examples kept of each reason for dropping


class Entry(Protocol):
    """What is needed to know of a dataset; `config.DatasetConfig` is one."""

    @property
    def path(self) -> str: ...
    @property
    def name(self) -> str | None: ...
    @property
    def format(self) -> str: ...
    @property
    def columns(self) -> Mapping[str, str]: ...
    @property
    def limit(self) -> int | None: ...


class Settings(NamedTuple):
    """How every source of a run is prepared."""

    tokenizer: Tokenizer
    template: Template
    train_on: TrainOn = "assistant"
    max_length: int = 2048
    truncation: Truncation = "drop"


class Prepared(NamedTuple):
    """A row as it will be trained, or why it will not. `tokens` may be there either way."""

    row: int  # the record's place in its file, from 0
    line: int  # the line it starts on, from 1
    text: str
    tokens: Tokens | None
    dropped: Dropped | None
    split: bool = False
    inexact: bool = False
    cut: bool = False  # to max_length
    lost: int = 0  # trained tokens cut off with it
    typed_control: bool = False  # the record's own text contains control tokens


def dataset_name(entry: Entry) -> str:
    return entry.name or entry.path.rsplit("/", 1)[-1].split(".")[0]


def read(entry: Entry) -> Iterator[tuple[int, int, formats.Noun | Dropped]]:
    """(row, line, noun) of every record of a source, up to its limit. Raises `DataError`."""
    path = sources.check(entry.path)
    name = entry.format
    for row, (line, fields) in enumerate(itertools.islice(sources.read(path), entry.limit)):
        where = f"{entry.path}:{line}"
        if row == 0:
            name = formats.resolve(name, entry.columns, fields, where)
        yield row, line, formats.to_noun(name, fields, entry.columns, where)


def format_of(entry: Entry) -> str:
    """The entry's format, `auto` decided. Raises `DataError`."""
    path = sources.check(entry.path)
    first = next(sources.read(path), None)
    if first is None:
        raise DataError(f"{entry.path}: the file is empty. Expected JSON objects.")
    return formats.resolve(entry.format, entry.columns, first.fields, f"{entry.path}:{first.line}")


def prepare(entry: Entry, settings: Settings) -> Iterator[Prepared]:
    """Every row of a source in order, dropped ones included."""
    records = read(entry)
    while chunk := list(itertools.islice(records, _CHUNK)):
        yield from _prepare_chunk(chunk, entry, settings)


def _prepare_chunk(
    chunk: Iterable[tuple[int, int, formats.Noun | Dropped]], entry: Entry, settings: Settings
) -> Iterator[Prepared]:
    rendered: list[tuple[int, int, tuple[Span, ...] | Dropped, bool]] = []
    for row, line, noun in chunk:
        if isinstance(noun, Dropped):
            rendered.append((row, line, noun, False))
            continue
        if not _is_unicode(noun):
            rendered.append((row, line, Dropped("the text is not valid Unicode"), False))
            continue
        typed = _types_control(noun, settings.tokenizer)
        rows = render(settings.template, noun, train_on=settings.train_on)
        rendered += [(row, line, spans, typed) for spans in rows]
    whole = [spans for _, _, spans, _ in rendered if not isinstance(spans, Dropped)]
    encoded = iter(encode(whole, settings.tokenizer))
    for row, line, spans, typed in rendered:
        if isinstance(spans, Dropped):
            yield Prepared(row, line, "", None, spans, typed_control=typed)
            continue
        text = "".join(span.text for span in spans)
        result = next(encoded)
        if isinstance(result, Dropped):
            yield Prepared(row, line, text, None, result, typed_control=typed)
        else:
            prepared = Prepared(row, line, text, result.tokens, None, result.split, result.inexact)
            yield _fit(prepared, entry, settings)._replace(typed_control=typed)


def _fit(prepared: Prepared, entry: Entry, settings: Settings) -> Prepared:
    """Applies `truncation` to a row longer than `max_length` tokens."""
    tokens, limit = prepared.tokens, settings.max_length
    if tokens is None or len(tokens.ids) <= limit:
        return prepared
    detail = f"{len(tokens.ids)} tokens, max_length {limit}"
    if settings.truncation == "error":
        raise DataError(
            f"{entry.path}:{prepared.line}: {detail}. Raise max_length, or set truncation to "
            "drop or truncate."
        )
    if settings.truncation == "drop":
        return prepared._replace(dropped=Dropped("longer than max_length", detail))
    kept = truncate(tokens, limit)
    if not kept.weights.any():
        reason = "nothing left to train within max_length"
        return prepared._replace(dropped=Dropped(reason, detail))
    lost = int(np.count_nonzero(tokens.weights)) - int(np.count_nonzero(kept.weights))
    return prepared._replace(tokens=kept, cut=True, lost=lost)


def _texts(noun: Conversation | Document) -> Iterator[str]:
    if isinstance(noun, Document):
        yield noun.text
        return
    for message in noun.messages:
        yield message.content
        yield message.input


def _is_unicode(noun: Conversation | Document) -> bool:
    """Half a surrogate pair is legal in JSON and no text; tokenizers refuse it."""
    try:
        for text in _texts(noun):
            text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _types_control(noun: Conversation | Document, tokenizer: Tokenizer) -> bool:
    return any(tokenizer.control_pattern.search(text) for text in _texts(noun))


def cache_key(entry: Entry, settings: Settings) -> str:
    """Everything that decides the tokens of a source; no path, no name, no output folder."""
    parts = {
        "data": sources.digest(sources.check(entry.path)),
        "format": entry.format,
        "columns": dict(sorted(entry.columns.items())),
        "limit": entry.limit,
        "tokenizer": settings.tokenizer.fingerprint,
        "template": settings.template.fingerprint,
        "train_on": settings.train_on,
        "max_length": settings.max_length,
        "truncation": settings.truncation,
        "code": code_version(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


def build(writer: Writer, entry: Entry, settings: Settings) -> dict[str, Any]:
    """Writes the examples of a source and returns what was counted on the way."""
    counts: collections.Counter[str] = collections.Counter()
    reasons: dict[str, dict[str, Any]] = {}
    offset, last_row = 0, -1
    writer.append("offsets", np.zeros(1, np.int64))
    rows = prepare(entry, settings)
    while chunk := list(itertools.islice(rows, _CHUNK)):
        kept: list[Tokens] = []
        numbers: list[int] = []
        for item in chunk:
            counts["records"] += item.row != last_row
            last_row = item.row
            counts["typed_control_tokens"] += item.typed_control
            if item.dropped or item.tokens is None:
                reason, detail = item.dropped or Dropped("nothing to train")
                found = reasons.setdefault(reason, {"count": 0, "first": []})
                found["count"] += 1
                if len(found["first"]) < _SHOWN:
                    found["first"].append({"line": item.line, "detail": detail})
                continue
            counts["split_at_boundary"] += item.split
            counts["answers_not_kept_exactly"] += item.inexact
            counts["truncated"] += item.cut
            counts["answers_cut"] += item.lost > 0
            counts["trained_tokens_cut"] += item.lost
            kept.append(item.tokens)
            numbers.append(item.row)
        if kept:
            ids = [tokens.ids for tokens in kept]
            writer.append("ids", np.concatenate(ids))
            writer.append("weights", np.concatenate([tokens.weights for tokens in kept]))
            ends = offset + np.cumsum([len(part) for part in ids])
            writer.append("offsets", ends)
            writer.append("rows", np.array(numbers))
            writer.append("digests", np.array([_digest(part) for part in ids], np.uint64))
            offset = int(ends[-1])
    return {
        "format": format_of(entry),
        "content": writer.content,
        "counts": dict(counts),
        "dropped": dict(sorted(reasons.items(), key=lambda item: -item[1]["count"])),
    }


def _digest(ids: np.ndarray[Any, Any]) -> int:
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")
