"""Formats: record -> noun. Knows the columns of each format; knows no file and no template.

To add a format: one function and one line in `FORMATS`. A column that is absent is a mistake in the
configuration and raises; a value that is no use (null, wrong type, empty) drops that row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, overload

import numpy as np

from jaxtune.config import ConfigError, DataError, kwargs_mistake, nearest
from jaxtune.data.column_guess import columns_hint
from jaxtune.data.schema import Conversation, Document, Dropped, Message, WeightedTokens
from jaxtune.data.token_rows import OPTIONAL, token_row

Noun = Conversation | Document | WeightedTokens
Fields = Mapping[str, Any]


class Format(NamedTuple):
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Fields], Noun | Dropped]


class _Unusable(Exception):
    """A bad value on its way to `to_noun`, as the `Dropped` that it makes of the row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.dropped = Dropped(reason, detail)


ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation"), "tool"),
    "function_call": "assistant",  # whose text is the call
}


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


@overload
def to_noun(
    name: Literal["messages"], record: Fields, columns: Mapping[str, str], where: str
) -> Conversation | Dropped: ...
@overload
def to_noun(
    name: str, record: Fields, columns: Mapping[str, str], where: str
) -> Noun | Dropped: ...
def to_noun(name: str, record: Fields, columns: Mapping[str, str], where: str) -> Noun | Dropped:
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
        return FORMATS[name].read(fields)
    except _Unusable as problem:
        return problem.dropped


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
        raise _Unusable(f"{name} is not text", f"got {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"


def _alpaca(fields: Fields) -> Conversation:
    instruction = _text(fields, "instruction", required=True)
    own_input = _text(fields, "input")
    answer = _text(fields, "output", required=True)
    if not (instruction + own_input).strip():
        raise _Unusable("empty instruction")
    earlier: list[Message] = []
    history = fields.get("history") or ()
    if not isinstance(history, list | tuple):
        raise _Unusable("history is not a list of pairs", f"got {_short(history)}")
    for pair in history:
        if not isinstance(pair, list | tuple) or not all(isinstance(p, str) for p in pair):
            raise _Unusable("history is not a list of pairs", f"got {_short(pair)}")
        if len(pair) != 2:
            raise _Unusable("history is not a list of pairs", f"got {_short(pair)}")
        earlier += [Message("user", pair[0]), Message("assistant", pair[1])]
    turn = (Message("user", instruction, own_input), Message("assistant", answer))
    messages = (*_system(fields), *earlier, *turn)
    return Conversation(messages, template_kwargs=_template_kwargs(fields))


def _prompt_completion(fields: Fields) -> Conversation:
    prompt, completion = _sequence(fields["prompt"]), _sequence(fields["completion"])
    before = (
        _messages(prompt, "prompt")
        if isinstance(prompt, list)
        else (Message("user", _text(fields, "prompt", required=True)),)
    )
    after = (
        _messages(completion, "completion")
        if isinstance(completion, list)
        else (Message("assistant", _text(fields, "completion", required=True)),)
    )
    if not any(message.content.strip() for message in before):
        raise _Unusable("empty prompt")
    context = (*_system(fields), *before)
    return _conversation(fields, (*context, *after), len(context))


def _chat(column: str) -> Callable[[Fields], Conversation]:
    def read(fields: Fields) -> Conversation:
        return _conversation(fields, (*_system(fields), *_messages(fields[column], column)))

    return read


def _conversation(fields: Fields, messages: tuple[Message, ...], context: int = 0) -> Conversation:
    return Conversation(messages, _tools(fields), context, _template_kwargs(fields))


def _template_kwargs(fields: Fields) -> dict[str, Any]:
    """Read the column `chat_template_kwargs`: an object, or its JSON text.

    A null in it is an argument that is not set: tables fill what other rows have with nulls.
    """
    kwargs = _parsed(fields.get(_KWARGS), "{")
    if not kwargs:
        return {}
    if not isinstance(kwargs, dict):
        raise _Unusable("chat_template_kwargs is not an object", f"got {_short(kwargs)}")
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if mistake := kwargs_mistake(kwargs):
        raise _Unusable("chat_template_kwargs cannot be used", mistake)
    return kwargs


def _document(fields: Fields) -> Document:
    text = _text(fields, "text", required=True)
    if not text.strip():
        raise _Unusable("empty text")
    return Document(text)


def _system(fields: Fields) -> tuple[Message, ...]:
    text = _text(fields, "system")
    return (Message("system", text),) if text else ()


def _tools(fields: Fields) -> tuple[Any, ...] | None:
    """Read the column `tools`: a list, or its JSON text, of what the model may call."""
    tools = _listed(fields.get("tools"))
    if tools in (None, "", [], {}):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _Unusable("tools is not a list of objects", f"got {_short(tools)}")
    return tuple(_declared(tool) for tool in tools)


def _declared(tool: dict[str, Any]) -> dict[str, Any]:
    """Wrap a bare function as chat templates and servers expect it."""
    bare = isinstance(tool.get("name"), str) and "function" not in tool and "type" not in tool
    return {"type": "function", "function": tool} if bare else tool


def _parsed(value: Any, opening: str) -> Any:
    """Parse a list ("[") or object ("{") that a table or an exporter has written as JSON text;
    return anything else as it is.
    """
    if isinstance(value, str) and value.lstrip().startswith(opening):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _listed(value: Any) -> Any:
    """Return a list that came as JSON text, or as an object of lists, as the list that is meant;
    anything else as it is.
    """
    return _sequence(_parsed(value, "["))


def _sequence(value: Any) -> Any:
    """Turn an object of lists into a list of objects: datasets writes `Sequence({...})` so.

    >>> _sequence({"role": ["user", "assistant"], "content": ["Why?", "So."]})
    [{'role': 'user', 'content': 'Why?'}, {'role': 'assistant', 'content': 'So.'}]
    """
    if not isinstance(value, dict) or not value:
        return value
    columns = list(value.values())
    if not all(isinstance(column, list) for column in columns):
        return value
    if len({len(column) for column in columns}) > 1:
        lengths = ", ".join(f"{key} {len(column)}" for key, column in value.items())
        raise _Unusable("an object of lists that are not equally long", lengths)
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def _messages(value: Any, column: str) -> tuple[Message, ...]:
    value = _listed(value)
    if not isinstance(value, list) or not value:
        raise _Unusable(f"{column} is not a list of messages", f"got {_short(value)}")
    return tuple(_message(item) for item in value)


def _message(item: Any) -> Message:
    if not isinstance(item, dict):
        raise _Unusable("a message is not an object", f"got {_short(item)}")
    role = _first(item, _ROLE)
    if not isinstance(role, str) or role.strip().lower() not in ROLES:
        raise _Unusable(f"role {role!r:.40} is not known", f"known: {', '.join(ROLES)}")
    content, weight = _first(item, _CONTENT), _weight(item)
    # A null key is an absent one, as for every column; what lies deeper is kept as it is.
    extra = {key: value for key, value in item.items() if value is not None and key not in _READ}
    if role.strip().lower() == "function_call":
        extra["tool_calls"] = [_call(call) for call in _calls_in(content)]
        return Message("assistant", "", weight=weight, extra=extra)
    if "tool_calls" in extra:
        extra["tool_calls"] = _sequence(extra["tool_calls"])
    if not extra.get("tool_calls", True):
        del extra["tool_calls"]
    calls = extra.get("tool_calls")
    if calls is not None and not (
        isinstance(calls, list) and all(isinstance(call, dict) for call in calls)
    ):
        raise _Unusable("tool_calls is not a list of objects", f"got {_short(calls)}")
    if content is None and calls:
        content = ""
    return Message(ROLES[role.strip().lower()], _joined(content), weight=weight, extra=extra)


def _joined(content: Any) -> str:
    """Read text, or content parts; text parts one after the other."""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                raise _Unusable("content holds a part that is not text", f"got {_short(part)}")
            if part.get("type", "text") != "text":
                raise _Unusable("content holds a part that is not text", f"got {_short(part)}")
            if _weight(part) is not None:
                raise _Unusable("a part of a message has its own weight", f"got {_short(part)}")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise _Unusable("content is not text", f"got {_short(content)}")
    return content


def _calls_in(content: Any) -> list[Any]:
    """Read the calls of a `function_call` turn: an object or a list of them, or their JSON text."""
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        raise _Unusable("a function call is not JSON", f"got {_short(content)}") from None
    return calls if isinstance(calls, list) and calls else [calls]


def _call(call: Any) -> dict[str, Any]:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise _Unusable("a function call has no name", f"got {_short(call)}")
    function = {"name": call["name"], "arguments": call.get("arguments", {})}
    return {"type": "function", "function": function}


def _first(item: Fields, names: tuple[str, ...]) -> Any:
    """Return the value of the first of `names` that is there and not null."""
    return next((item[name] for name in names if item.get(name) is not None), None)


def _weight(item: Fields) -> float | None:
    """Read `weight`, under any of the names in use; `masked` says the opposite."""
    weights = [(name, item[name]) for name in _WEIGHT if item.get(name) is not None]
    if len(weights) > 1:
        raise _Unusable("a message has two weights", " and ".join(name for name, _ in weights))
    if not weights:
        return None
    name, value = weights[0]
    if not isinstance(value, bool | int | float) or not 0 <= value <= _LARGEST:
        raise _Unusable(f"{name} is not a number >= 0 within float32", f"got {_short(value)}")
    return float(not value) if name == "masked" else float(value)


_ROLE = ("role", "from")
_CONTENT = ("content", "value")
_LARGEST = float(np.finfo(np.float32).max)  # weights are stored so
_WEIGHT = ("weight", "loss_weight", "loss", "train", "masked")
# Keys of a message that are read here. `input` is Alpaca's: our own templates give it a place that
# no message of a chat has.
_READ = frozenset((*_ROLE, *_CONTENT, *_WEIGHT, "input"))

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
