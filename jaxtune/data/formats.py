"""One record -> one noun. Knows the columns of each format; knows no file and no template.

To add a format: one function and one line in `FORMATS`. A column that is absent is a mistake in the
configuration and raises; a value that is no use (null, wrong type, empty) drops that row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtune.config import ConfigError, DataError, nearest
from jaxtune.data.schema import Conversation, Document, Dropped, Message

Noun = Conversation | Document
Fields = Mapping[str, Any]


class Format(NamedTuple):
    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Fields], Noun]


class _Unusable(Exception):
    """Internal: carries `Dropped` from where the bad value is seen to `to_noun`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.dropped = Dropped(reason, detail)


ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation"), "tool"),
}


def detect(columns: Fields) -> str | None:
    """The first format all of whose required columns are there."""
    return next((n for n, f in FORMATS.items() if all(c in columns for c in f.required)), None)


def resolve(name: str, columns: Mapping[str, str], first: Fields, where: str) -> str:
    """The format's name, `auto` decided by the first record; checks `columns` both ways.

    `where` is the file and line of the first record, for errors.
    """
    if name == "auto":
        found = detect(_rename(first, columns))
        if found is None:
            raise DataError(
                f"{where}: no known format has these columns: {', '.join(first) or 'none'}. "
                f"Known: {_known()}. Set datasets[].format, and datasets[].columns to map names."
            )
        name = found
    known = FORMATS[name].required + FORMATS[name].optional
    for standard, column in columns.items():
        if standard not in known:
            raise ConfigError(
                f"datasets[].columns: format '{name}' has no '{standard}'."
                f"{nearest(standard, known)} It has: {', '.join(known)}."
            )
        if column not in first:
            raise DataError(
                f"{where}: columns maps {standard} to '{column}'; the record has: "
                f"{', '.join(first) or 'nothing'}."
            )
    return name


def to_noun(name: str, record: Fields, columns: Mapping[str, str], where: str) -> Noun | Dropped:
    """Reads one record as format `name`; raises `DataError` when a required column is absent."""
    fields = _rename(record, columns)
    for column in FORMATS[name].required:
        if column not in fields:
            wanted = columns.get(column, column)
            raise DataError(
                f"{where}: format '{name}' needs '{wanted}'; the record has: "
                f"{', '.join(record) or 'nothing'}. Set datasets[].columns, or rename the field."
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
    given = _text(fields, "input")
    answer = _text(fields, "output", required=True)
    if not (instruction + given).strip():
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
    turn = (Message("user", instruction, given), Message("assistant", answer))
    return Conversation((*_system(fields), *earlier, *turn))


def _prompt_completion(fields: Fields) -> Conversation:
    prompt, completion = fields["prompt"], fields["completion"]
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
    # Only what stands in the completion is trained, also when the prompt holds earlier answers.
    context = tuple(
        m._replace(weight=0.0) if m.role == "assistant" and m.weight is None else m for m in before
    )
    return Conversation((*_system(fields), *context, *after))


def _chat(column: str) -> Callable[[Fields], Conversation]:
    def read(fields: Fields) -> Conversation:
        if fields.get("tools") not in (None, "", "[]", [], {}):
            raise _Unusable("tools are not rendered", "the row declares tools")
        return Conversation((*_system(fields), *_messages(fields[column], column)))

    return read


def _document(fields: Fields) -> Document:
    text = _text(fields, "text", required=True)
    if not text.strip():
        raise _Unusable("empty text")
    return Document(text)


def _system(fields: Fields) -> tuple[Message, ...]:
    text = _text(fields, "system")
    return (Message("system", text),) if text else ()


def _messages(value: Any, column: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _Unusable(f"{column} is not a list of messages", f"got {_short(value)}")
    return tuple(_message(item) for item in value)


def _message(item: Any) -> Message:
    if not isinstance(item, dict):
        raise _Unusable("a message is not an object", f"got {_short(item)}")
    said = item.get("role", item.get("from"))
    if not isinstance(said, str) or said.strip().lower() not in ROLES:
        raise _Unusable(f"role {said!r:.40} is not known", f"known: {', '.join(ROLES)}")
    if item.get("tool_calls"):
        raise _Unusable("tool calls are not rendered")
    content = item.get("content", item.get("value"))
    if isinstance(content, list):  # content parts; text parts read one after the other
        if not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            raise _Unusable("content holds parts that are not text", f"got {_short(content)}")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise _Unusable("content is not text", f"got {_short(content)}")
    return Message(ROLES[said.strip().lower()], content, weight=_weight(item))


def _weight(item: Fields) -> float | None:
    """`weight`, under any of the names in use; `masked` says the opposite."""
    names = ("weight", "loss_weight", "loss", "train", "masked")
    given = [(name, item[name]) for name in names if item.get(name) is not None]
    if len(given) > 1:
        raise _Unusable("a message has two weights", " and ".join(name for name, _ in given))
    if not given:
        return None
    name, value = given[0]
    if not isinstance(value, bool | int | float) or not 0 <= value < float("inf"):
        raise _Unusable(f"{name} is not a number >= 0", f"got {_short(value)}")
    return float(not value) if name == "masked" else float(value)


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), ("system", "tools"), _chat("messages")),
    "sharegpt": Format(("conversations",), ("system", "tools"), _chat("conversations")),
    "alpaca": Format(("instruction", "output"), ("input", "system", "history"), _alpaca),
    "prompt_completion": Format(("prompt", "completion"), ("system",), _prompt_completion),
    "text": Format(("text",), (), _document),
}
