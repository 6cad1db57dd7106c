"""A source, from its file to examples: read, format, render, tokenise, cut to length, count.

The chain itself, used alike by `preview` (which shows every row) and by the cache (which stores
those that are trained). Knows no batch and no step.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from jaxtune.config import DataError, label
from jaxtune.data import formats, sources
from jaxtune.data.cache import Writer, code_version
from jaxtune.data.in_prompt import FewShotExample, behind_examples
from jaxtune.data.readers import File, Record, location
from jaxtune.data.report.near_duplicates import signatures
from jaxtune.data.schema import SYSTEM_ROLES, Conversation, Document, Dropped, Span, WeightedTokens
from jaxtune.data.templating import literal_special_tokens
from jaxtune.data.templating.masking import TrainOn, render
from jaxtune.data.templating.template import Template, variant
from jaxtune.data.tokenize import tokenize_rows, truncate
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.data.workers import in_order

Progress = Callable[[str, int], None]  # (path, records done so far)
Truncation = Literal["drop", "truncate", "error"]

# What is noted of each example in its byte of `flags`, from the lowest bit.
FLAGS = (
    "split_at_boundary",
    "answers_not_kept_exactly",
    "truncated",
    "answers_cut",
    "typed_control_tokens",
    "short_answers",
    "not_provable",
    "no_stop_trained",
)

# Records tokenised together: enough for a tokenizer's threads, little enough to stream. Fixed, so
# that the result does not depend on the number of processes.
_CHUNK = 512
_SHOWN = 3  # examples kept of each reason for dropping
# Counted until all is read: records that have a column, one that is not used, and an argument that
# no template reads.
_COLUMN, _UNUSED, _UNREAD = "column ", "unused ", "unread "


class Proportions(Protocol):
    @property
    def column(self) -> str: ...
    @property
    def target(self) -> Mapping[str, float]: ...


class Entry(Protocol):
    """A dataset's fields; `config.DatasetConfig` is one."""

    @property
    def path(self) -> str: ...
    @property
    def name(self) -> str | None: ...
    @property
    def format(self) -> str: ...
    @property
    def columns(self) -> Mapping[str, str]: ...
    @property
    def roles(self) -> Mapping[str, str]: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def template(self) -> str | None: ...
    @property
    def system_prompt(self) -> str | None: ...
    @property
    def weight(self) -> float: ...
    @property
    def proportions(self) -> Proportions | None: ...
    @property
    def split(self) -> str | None: ...
    @property
    def revision(self) -> str | None: ...


class PreprocessConfig(NamedTuple):
    """A run's way from records to tokens, the same for every source."""

    tokenizer: Tokenizer
    template: Template
    train_on: TrainOn = "assistant"
    max_length: int = 2048
    truncation: Truncation = "drop"
    prompt_loss_weight: float = 0.0
    examples: tuple[FewShotExample, ...] = ()  # before every conversation, but for the last


def entry_config(entry: Entry, config: PreprocessConfig) -> PreprocessConfig:
    """Return `config` with the entry's own template and system prompt, if it has them."""
    own = variant(
        config.template,
        config.tokenizer,
        template=entry.template,
        system_prompt=entry.system_prompt,
    )
    return config._replace(template=own)


Numbered = tuple[int, Record]  # a record and its place in its file, from 0


class PreprocessedRow(NamedTuple):
    """A row as it will be trained, or why it will not. `tokens` may be there either way."""

    row: int  # the record's place in its file, from 0
    file: str
    line: int  # it starts on, from 1; in a table its row
    value: str  # in the column of `proportions`; "" where there are none
    text: str
    tokens: WeightedTokens | None
    dropped: Dropped | None
    untrained: tuple[Dropped, ...] = ()  # answers of the record that are only context, and why
    split: bool = False
    inexact: bool = False
    cut: bool = False  # to max_length
    lost: int = 0  # trained tokens cut off with it
    literal_special: bool = False  # the record's own text contains special tokens
    short: bool = False  # a trained answer is one word
    unproven: bool = False  # it came as token ids
    endless: bool = False  # and trains none that ends a turn
    answers: int = 0  # that are trained
    own_text: str = ""  # the record's own text, without what its system messages say
    unread: tuple[str, ...] = ()  # the record's template arguments that the template never reads

    @property
    def where(self) -> str:
        return location(self.file, self.line)


def dataset_names(entries: Sequence[Entry]) -> list[str]:
    """Name each dataset: its `name`, else the end of its path without suffix.

    Of paths that end alike, as much more as tells them apart.
    """
    ends = [_name_of(entry.path, 1) for entry in entries]
    names = []
    for entry, end in zip(entries, ends, strict=True):
        alike = {e.path for e, other in zip(entries, ends, strict=True) if other == end}
        parts = 1
        while len({_name_of(path, parts) for path in alike}) < len(alike):
            parts += 1
        names.append(entry.name or _name_of(entry.path, parts))
    return names


def _name_of(path: str, parts: int) -> str:
    """Return the last `parts` of a path, without the suffix."""
    ends = path.rstrip("/").split("/")[-parts:]
    end = ends[-1].split(".")[0]
    return path if not end or "*" in end or len(ends) < parts else "/".join([*ends[:-1], end])


def read(entry: Entry) -> Iterator[Numbered]:
    """Yield every record of a source with its number, up to its limit. Raises `DataError`."""
    return enumerate(itertools.islice(sources.read(files_of(entry)), entry.limit))


def files_of(entry: Entry) -> tuple[File, ...]:
    return sources.find(entry.path, split=entry.split, revision=entry.revision, config=entry.name)


def format_of(entry: Entry) -> str:
    """Return the entry's format, `auto` decided by its first record. Raises `DataError`."""
    first = next(sources.read(files_of(entry)))
    return formats.resolve(entry.format, entry.columns, first.fields, first.where)


def noun_of(record: Record, name: str, entry: Entry) -> formats.Noun | Dropped:
    """Read a record of `entry` as format `name`. Raises `DataError`."""
    return formats.to_noun(name, record.fields, entry.columns, record.where, entry.roles)


def preprocess(entry: Entry, config: PreprocessConfig) -> Iterator[PreprocessedRow]:
    """Yield every row of a source in order, dropped ones included."""
    config = entry_config(entry, config)
    name = format_of(entry)
    for chunk in _chunks(read(entry)):
        yield from preprocess_chunk(chunk, name, entry, config)


def _chunks(records: Iterator[Numbered]) -> Iterator[list[Numbered]]:
    """Yield records in chunks; parsing here and not in the workers costs 8 us of a row's 400."""
    while chunk := list(itertools.islice(records, _CHUNK)):
        yield chunk


def preprocess_chunk(
    chunk: Sequence[Numbered], name: str, entry: Entry, config: PreprocessConfig
) -> Iterator[PreprocessedRow]:
    """Yield the rows of some records, read as format `name` and tokenised together."""
    rendered: list[tuple[PreprocessedRow, tuple[Span, ...] | WeightedTokens | Dropped]] = []
    for row, record in chunk:
        noun = noun_of(record, name, entry)
        value = label(record.fields.get(entry.proportions.column)) if entry.proportions else ""
        base = PreprocessedRow(row, record.file, record.line, value, "", None, None)
        if isinstance(noun, Dropped):
            rendered.append((base, noun))
            continue
        if isinstance(noun, WeightedTokens):
            rendered.append(_of_tokens(base, noun, config))
            continue
        if not _is_unicode(noun):
            rendered.append((base, Dropped("the text is not valid Unicode")))
            continue
        base = base._replace(
            literal_special=_holds_special(noun, config.tokenizer),
            own_text=_own_text(noun),
            unread=_unread(noun, config.template),
        )
        if config.examples and isinstance(noun, Conversation):
            noun = behind_examples(noun, config.examples)
        rows = render(
            config.template,
            noun,
            train_on=config.train_on,
            prompt_weight=config.prompt_loss_weight,
        )
        rendered += [(base, spans) for spans in rows]
    whole = [spans for _, spans in rendered if not isinstance(spans, Dropped | WeightedTokens)]
    encoded = iter(tokenize_rows(whole, config.tokenizer))
    for base, spans in rendered:
        if isinstance(spans, Dropped):
            yield base._replace(dropped=spans)
            continue
        if isinstance(spans, WeightedTokens):
            yield _fit(base._replace(tokens=spans, unproven=True), entry, config)
            continue
        text = "".join(span.text for span in spans)
        result = next(encoded)
        if isinstance(result, Dropped):
            yield base._replace(text=text, dropped=result)
            continue
        prepared = base._replace(
            text=text,
            untrained=tuple(lost for span in spans for lost in span.untrained),
            tokens=result.tokens,
            split=result.split,
            inexact=result.inexact,
            short=_has_short_answer(spans, config.template.stop),
            answers=sum(span.answer and span.weight > 0 for span in spans),
        )
        yield _fit(prepared, entry, config)


def _of_tokens(
    base: PreprocessedRow, tokens: WeightedTokens, config: PreprocessConfig
) -> tuple[PreprocessedRow, WeightedTokens | Dropped]:
    """Decode a row that came as token ids; drop it if they are not the tokenizer's."""
    tokenizer = config.tokenizer
    foreign = tokens.ids[(tokens.ids < 0) | (tokens.ids >= tokenizer.size)]
    if len(foreign):
        detail = f"id {foreign[0]}; the tokenizer has {tokenizer.size:,}"
        return base, Dropped("a token id is not in the tokenizer's vocabulary", detail)
    text = tokenizer.decode(tokens.ids.tolist())
    stops = (*config.template.stop_ids, tokenizer.eos_id)
    ends = np.isin(tokens.ids[tokens.weights > 0], [i for i in stops if i is not None])
    return base._replace(text=text, own_text=text, endless=not ends.any()), tokens


def _fit(prepared: PreprocessedRow, entry: Entry, config: PreprocessConfig) -> PreprocessedRow:
    """Apply `truncation` to a row longer than `max_length` tokens."""
    tokens, limit = prepared.tokens, config.max_length
    if tokens is None or len(tokens.ids) <= limit:
        return prepared
    detail = f"{len(tokens.ids)} tokens, max_length {limit}"
    if config.truncation == "error":
        raise DataError(
            f"{prepared.where}: {detail}. Raise max_length, or set truncation to drop or truncate."
        )
    if config.truncation == "drop":
        return prepared._replace(dropped=Dropped("longer than max_length", detail))
    shortened = truncate(tokens, limit)
    if not shortened.weights.any():
        reason = "nothing left to train within max_length"
        return prepared._replace(dropped=Dropped(reason, detail))
    lost = int(np.count_nonzero(tokens.weights)) - int(np.count_nonzero(shortened.weights))
    return prepared._replace(tokens=shortened, cut=True, lost=lost)


def _texts(noun: Conversation | Document) -> Iterator[str]:
    if isinstance(noun, Document):
        yield noun.text
        return
    for message in noun.messages:
        yield message.content
        yield message.input


def _all_texts(noun: Conversation | Document) -> Iterator[str]:
    """Yield what a template may show: also of calls, thinking and tools."""
    yield from _texts(noun)
    if isinstance(noun, Conversation):
        beside = [*(message.extra for message in noun.messages), noun.tools, noun.template_kwargs]
        yield from literal_special_tokens.strings([value for value in beside if value])


def _is_unicode(noun: Conversation | Document) -> bool:
    """Tell whether the text is valid: half a surrogate pair is legal in JSON, and tokenizers refuse
    it.
    """
    try:
        "".join(_all_texts(noun)).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _own_text(noun: Conversation | Document) -> str:
    if isinstance(noun, Document):
        return noun.text
    return "\n".join(
        f"{message.content}\n{message.input}"
        for message in noun.messages
        if message.role not in SYSTEM_ROLES
    )


def _has_short_answer(spans: tuple[Span, ...], stop: str) -> bool:
    answers = (span.text for span in spans if span.answer and span.weight > 0)
    return any(len(text.removesuffix(stop).split(None, 2)) < 2 for text in answers)


def _unread(noun: Conversation | Document, template: Template) -> tuple[str, ...]:
    if isinstance(noun, Document) or not noun.template_kwargs:
        return ()
    return tuple(template.unread([noun.template_kwargs]))


def _holds_special(noun: Conversation | Document, tokenizer: Tokenizer) -> bool:
    return tokenizer.special_pattern.search("\0".join(_texts(noun))) is not None


def cache_key(entry: Entry, config: PreprocessConfig) -> str:
    """Hash everything that decides the tokens of a source; no path, no name, no output folder."""
    parts = {
        "data": sources.digest(files_of(entry)),
        "format": entry.format,
        "columns": dict(sorted(entry.columns.items())),
        "roles": dict(sorted(entry.roles.items())),
        "limit": entry.limit,
        "column": entry.proportions.column if entry.proportions else None,
        "tokenizer": config.tokenizer.fingerprint,
        "template": config.template.fingerprint,
        "train_on": config.train_on,
        "prompt_loss_weight": config.prompt_loss_weight,
        "examples": config.examples,
        "max_length": config.max_length,
        "truncation": config.truncation,
        "code": code_version(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


class TokenizedChunk(NamedTuple):
    """A chunk of records as arrays to append to the cache, and counts."""

    arrays: dict[str, NDArray[Any]]  # by the names of `cache.ARRAYS`; lengths in place of offsets
    values: tuple[str, ...]  # what the numbers in `arrays["values"]` stand for in this chunk
    counts: Counter[str]
    dropped: dict[str, dict[str, Any]]  # reason -> {"count", "first": [{"file", "line", "detail"}]}
    untrained: dict[str, dict[str, Any]]  # the same of answers that are only context in their row


def tokenize_chunk(
    chunk: Sequence[Numbered], *, name: str, entry: Entry, config: PreprocessConfig
) -> TokenizedChunk:
    """Turn records into arrays; a pure function of its arguments, run in any process."""
    counts: Counter[str] = Counter(records=len(chunk))
    for column in entry.columns.values():
        counts[_COLUMN + column] = sum(column in record.fields for _, record in chunk)
    unused = formats.unused_columns(name, (r.fields for _, r in chunk), entry.columns)
    counts.update(_UNUSED + column for column in unused)
    dropped: dict[str, dict[str, Any]] = {}
    untrained: dict[str, dict[str, Any]] = {}
    trained_rows: list[PreprocessedRow] = []
    tokens: list[WeightedTokens] = []
    unread: dict[int, tuple[str, ...]] = {}  # of records, which may make several rows
    for item in preprocess_chunk(chunk, name, entry, config):
        unread[item.row] = item.unread
        if item.dropped or item.tokens is None:
            _count(dropped, item, item.dropped or Dropped("nothing to train"))
            if item.tokens is not None:
                counts["trained_tokens_dropped"] += int(np.count_nonzero(item.tokens.weights))
        else:
            trained_rows.append(item)
            tokens.append(item.tokens)
            counts["answers"] += item.answers
            for lost in item.untrained:
                _count(untrained, item, lost)
    counts.update(_UNREAD + argument for names in unread.values() for argument in names)
    values: dict[str, int] = {}
    arrays = {
        "ids": _joined([part.ids for part in tokens]),
        "weights": _joined([part.weights for part in tokens]),
        "offsets": np.array([len(part.ids) for part in tokens], np.int64),
        "trained": np.array([np.count_nonzero(part.weights) for part in tokens], np.int32),
        "rows": np.array([item.row for item in trained_rows], np.int64),
        "values": np.array(
            [values.setdefault(item.value, len(values)) for item in trained_rows], np.int32
        ),
        "flags": np.array([_flags(item) for item in trained_rows], np.uint8),
        "lost": np.array([item.lost for item in trained_rows], np.int32),
        "digests": np.array([_digest(part.ids) for part in tokens], np.uint64),
        "signatures": signatures([item.own_text for item in trained_rows]).reshape(-1),
    }
    return TokenizedChunk(arrays, tuple(values), counts, dropped, untrained)


def build(
    writer: Writer, entry: Entry, config: PreprocessConfig, processes: int, progress: Progress
) -> dict[str, Any]:
    """Write the examples of a source and return what was counted on the way."""
    name = format_of(entry)
    files = [file.name for file in files_of(entry)]
    counts: Counter[str] = Counter()
    dropped: dict[str, dict[str, Any]] = {}
    untrained: dict[str, dict[str, Any]] = {}
    known: dict[str, int] = {}  # values of the column of `proportions`
    end = 0
    writer.append("offsets", np.zeros(1, np.int64))
    work = functools.partial(tokenize_chunk, name=name, entry=entry, config=config)
    with contextlib.closing(in_order(work, _chunks(read(entry)), processes)) as parts:
        for made in parts:
            counts.update(made.counts)
            _merge(dropped, made.dropped)
            _merge(untrained, made.untrained)
            ends = end + np.cumsum(made.arrays["offsets"])
            end = int(ends[-1]) if len(ends) else end
            numbers = [known.setdefault(value, len(known)) for value in made.values]
            values = np.array(numbers, np.int32)[made.arrays["values"]]
            for array, found in {**made.arrays, "offsets": ends, "values": values}.items():
                writer.append(array, found)
            progress(entry.path, counts["records"])
    for standard, column in entry.columns.items():
        if not counts.pop(_COLUMN + column, 0) and entry.limit is None:
            raise DataError(
                f"{entry.path}: columns: {standard} is {column}, which no record has. Mend the "
                "mapping, or leave it out."
            )
    # By number: the same data may lie elsewhere tomorrow.
    for reason in (*dropped.values(), *untrained.values()):
        reason["first"] = [
            {**first, "file": files.index(first["file"])} for first in reason["first"]
        ]
    return {
        "format": name,
        "content": writer.content,
        "values": list(known),
        "counts": {n: c for n, c in counts.items() if not n.startswith((_UNUSED, _UNREAD))},
        "unused_columns": _named(_UNUSED, counts),
        "unread_kwargs": _named(_UNREAD, counts),
        "dropped": _by_count(dropped),
        "untrained": _by_count(untrained),
    }


def _named(prefix: str, counts: Counter[str]) -> dict[str, int]:
    """Take out the counts of a kind, by what stands behind its prefix, in alphabetical order."""
    return {n.removeprefix(prefix): counts[n] for n in sorted(counts) if n.startswith(prefix)}


def _count(reasons: dict[str, dict[str, Any]], item: PreprocessedRow, lost: Dropped) -> None:
    first = [{"file": item.file, "line": item.line, "detail": lost.detail}]
    _merge(reasons, {lost.reason: {"count": 1, "first": first}})


def _by_count(reasons: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return dict(sorted(reasons.items(), key=lambda item: -item[1]["count"]))


def _merge(dropped: dict[str, dict[str, Any]], more: Mapping[str, dict[str, Any]]) -> None:
    for reason, found in more.items():
        entry = dropped.setdefault(reason, {"count": 0, "first": []})
        entry["count"] += found["count"]
        entry["first"] = (entry["first"] + found["first"])[:_SHOWN]


def _flags(item: PreprocessedRow) -> int:
    """Set bit i if `FLAGS[i]` is true of the row."""
    marks = (
        *(item.split, item.inexact, item.cut, item.lost > 0),
        *(item.literal_special, item.short, item.unproven, item.endless),
    )
    return sum(flag << bit for bit, flag in enumerate(marks))


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0)


def _digest(ids: NDArray[Any]) -> int:
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")
