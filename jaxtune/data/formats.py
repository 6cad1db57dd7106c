"""Formats: record -> noun. Knows the columns of each format; knows no file and no template.

To add a format: one function and one line in `FORMATS`. A column that is absent is a mistake in the
configuration and raises; a value that is no use (null, wrong type, empty) drops that row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxtune.config import ConfigError, DataError, kwargs_mistake, nearest
from jaxtune.data.column_guess import columns_hint
from jaxtune.data.messages import (
    Unusable,
    listed,
    parse_messages,
    parsed,
    sequence,
    short,
    with_roles,
)
from jaxtune.data.schema import Conversation, Document, Dropped, Message, WeightedTokens
from jaxtune.data.token_rows import OPTIONAL, token_row

Noun = Conversation | Document | WeightedTokens
Fields = Mapping[str, Any]
_TRAINED_ELSEWHERE = frozenset({"chosen", "rejected", "label", "input_ids"})


class Format(NamedTuple):
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Fields], Noun | Dropped]


def detect(columns: Fields) -> str | None:
    """Find the first format all of whose required columns are there."""
    return next((n for n, f in FORMATS.items() if all(c in columns for c in f.required)), None)


def resolve(name: str, columns: Mapping[str, str], first: Fields, where: str) -> str:
    """Resolve a format's name (`auto` by the first record) and check `columns` both ways.

    A column that is optional may be absent in that record and come later.

    `where` is the file and line of the first record, for errors.
    """
    if name == "auto":
        found = detect(_rename(first, columns))
        if found is None:
            raise DataError(
                f"{where}: no known format has these columns: {', '.join(first) or 'none'}. "
                f"Known: {_known()}. Set datasets[].format, or map names with columns."
                f"{columns_hint(first)}"
            )
        name = found
    required = FORMATS[name].required
    known = required + FORMATS[name].optional
    for standard, column in columns.items():
        if standard not in known:
            raise ConfigError(
                f"datasets[].columns: format '{name}' has no '{standard}'."
                f"{nearest(standard, known)} It has: {', '.join(known)}."
            )
        if standard in required and column not in first:
            raise DataError(
                f"{where}: columns maps {standard} to '{column}'; the record has: "
                f"{', '.join(first) or 'nothing'}.{nearest(column, list(first))}"
            )
    return name


def to_noun(
    name: str,
    record: Fields,
    columns: Mapping[str, str],
    where: str,
    roles: Mapping[str, str] | None = None,
) -> Noun | Dropped:
    """Read one record as format `name`. Raises `DataError` if a required column is absent."""
    fields = _rename(record, columns)
    for column in FORMATS[name].required:
        if column not in fields:
            wanted = columns.get(column, column)
            raise DataError(
                f"{where}: format '{name}' needs '{wanted}'; the record has: "
                f"{', '.join(record) or 'nothing'}. Set datasets[].columns, or rename the field."
                f"{columns_hint(fields, FORMATS[name].required)}"
            )
    try:
        if roles:
            fields = {key: with_roles(value, roles) for key, value in fields.items()}
        return FORMATS[name].read(fields)
    except Unusable as problem:
        return problem.dropped


def to_conversation(
    record: Fields, where: str, roles: Mapping[str, str] | None = None
) -> Conversation | Dropped:
    """Read the `messages` of a record that is of no dataset. Raises `DataError` as `to_noun`."""
    noun = to_noun("messages", record, {}, where, roles)
    assert isinstance(noun, Conversation | Dropped)
    return noun


def unused_columns(
    name: str, records: Iterable[Fields], columns: Mapping[str, str]
) -> Iterator[str]:
    """Yield, for each record, the columns that others train on, and its format does not read.

    A `label` is one where it says whether an answer is good; classes are called so too.
    """
    read = (*FORMATS[name].required, *FORMATS[name].optional, *columns.values())
    unread = _TRAINED_ELSEWHERE.difference(read)
    for record in records:
        for column in unread & record.keys():
            value = record[column]
            if isinstance(value, bool) if column == "label" else value is not None:
                yield column


def _rename(record: Fields, columns: Mapping[str, str]) -> Fields:
    moved = {standard: record[column] for standard, column in columns.items() if column in record}
    rest = {key: value for key, value in record.items() if key not in columns.values()}
    return {**rest, **moved} if columns else record


def _known() -> str:
    return "; ".join(f"{name} ({', '.join(f.required)})" for name, f in FORMATS.items())


def _text(fields: Fields, name: str, *, required: bool = False) -> str:
    value = fields.get(name)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        raise Unusable(f"{name} is not text", f"got {short(value)}")
    return value


def _alpaca(fields: Fields) -> Conversation:
    instruction = _text(fields, "instruction", required=True)
    own_input = _text(fields, "input")
    answer = _text(fields, "output", required=True)
    if not (instruction + own_input).strip():
        raise Unusable("empty instruction")
    earlier: list[Message] = []
    history = fields.get("history") or ()
    if not isinstance(history, list | tuple):
        raise Unusable("history is not a list of pairs", f"got {short(history)}")
    for pair in history:
        if not isinstance(pair, list | tuple) or not all(isinstance(p, str) for p in pair):
            raise Unusable("history is not a list of pairs", f"got {short(pair)}")
        if len(pair) != 2:
            raise Unusable("history is not a list of pairs", f"got {short(pair)}")
        earlier += [Message("user", pair[0]), Message("assistant", pair[1])]
    turn = (Message("user", instruction, own_input), Message("assistant", answer))
    turns = (*_system(fields), *earlier, *turn)
    return Conversation(turns, template_kwargs=_template_kwargs(fields))


def _prompt_completion(fields: Fields) -> Conversation:
    prompt, completion = sequence(fields["prompt"]), sequence(fields["completion"])
    before = (
        parse_messages(prompt, "prompt")
        if isinstance(prompt, list)
        else (Message("user", _text(fields, "prompt", required=True)),)
    )
    after = (
        parse_messages(completion, "completion")
        if isinstance(completion, list)
        else (Message("assistant", _text(fields, "completion", required=True)),)
    )
    if not any(message.content.strip() for message in before):
        raise Unusable("empty prompt")
    context = (*_system(fields), *before)
    return _conversation(fields, (*context, *after), len(context))


def _chat(column: str) -> Callable[[Fields], Conversation]:
    def read(fields: Fields) -> Conversation:
        turns = parse_messages(fields[column], column)
        return _conversation(fields, (*_system(fields), *turns))

    return read


def _conversation(fields: Fields, turns: tuple[Message, ...], context: int = 0) -> Conversation:
    return Conversation(turns, _tools(fields), context, _template_kwargs(fields))


def _template_kwargs(fields: Fields) -> dict[str, Any]:
    """Read the column `chat_template_kwargs`: an object, or its JSON text.

    A null in it is an argument that is not set: tables fill what other rows have with nulls.
    """
    kwargs = parsed(fields.get(_KWARGS), "{")
    if not kwargs:
        return {}
    if not isinstance(kwargs, dict):
        raise Unusable("chat_template_kwargs is not an object", f"got {short(kwargs)}")
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if mistake := kwargs_mistake(kwargs):
        raise Unusable("chat_template_kwargs cannot be used", mistake)
    return kwargs


def _document(fields: Fields) -> Document:
    text = _text(fields, "text", required=True)
    if not text.strip():
        raise Unusable("empty text")
    return Document(text)


def _system(fields: Fields) -> tuple[Message, ...]:
    text = _text(fields, "system")
    return (Message("system", text),) if text else ()


def _tools(fields: Fields) -> tuple[Any, ...] | None:
    """Read the column `tools`: a list, or its JSON text, of what the model may call."""
    tools = listed(fields.get("tools"))
    if tools in (None, "", [], {}):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable("tools is not a list of objects", f"got {short(tools)}")
    return tuple(_declared(tool) for tool in tools)


def _declared(tool: dict[str, Any]) -> dict[str, Any]:
    """Wrap a bare function as chat templates and servers expect it."""
    bare = isinstance(tool.get("name"), str) and "function" not in tool and "type" not in tool
    return {"type": "function", "function": tool} if bare else tool


_KWARGS = "chat_template_kwargs"
_OPTIONAL = ("system", "tools", _KWARGS)

FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), _OPTIONAL, _chat("messages")),
    "sharegpt": Format(("conversations",), _OPTIONAL, _chat("conversations")),
    "alpaca": Format(("instruction", "output"), ("input", "system", "history", _KWARGS), _alpaca),
    "prompt_completion": Format(("prompt", "completion"), _OPTIONAL, _prompt_completion),
    "tokens": Format(("input_ids",), OPTIONAL, token_row),
    "text": Format(("text",), (), _document),
}
