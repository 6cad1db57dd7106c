"""A record's list of messages -> `Message`s: roles, content parts, calls and weights.

A value that is no use raises `Unusable`, which becomes the reason for which the row is dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtune.config import ROLES
from jaxtune.data.schema import Dropped, Message
from jaxtune.data.templating import thinking

Fields = Mapping[str, Any]


class Unusable(Exception):
    """A bad value on its way to `to_noun`, as the `Dropped` that it makes of the row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.dropped = Dropped(reason, detail)


def short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"


def parsed(value: Any, opening: str) -> Any:
    """Parse a list ("[") or object ("{") that a table or an exporter has written as JSON text;
    return anything else as it is.
    """
    if isinstance(value, str) and value.lstrip().startswith(opening):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def listed(value: Any) -> Any:
    """Return a list that came as JSON text, or as an object of lists, as the list that is meant;
    anything else as it is.
    """
    return sequence(parsed(value, "["))


def sequence(value: Any) -> Any:
    """Turn an object of lists into a list of objects: datasets writes `Sequence({...})` so.

    >>> sequence({"role": ["user", "assistant"], "content": ["Why?", "So."]})
    [{'role': 'user', 'content': 'Why?'}, {'role': 'assistant', 'content': 'So.'}]
    """
    if not isinstance(value, dict) or not value:
        return value
    columns = list(value.values())
    if not all(isinstance(column, list) for column in columns):
        return value
    if len({len(column) for column in columns}) > 1:
        lengths = ", ".join(f"{key} {len(column)}" for key, column in value.items())
        raise Unusable("an object of lists that are not equally long", lengths)
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def parse_messages(value: Any, column: str) -> tuple[Message, ...]:
    """Read the messages in a record's `column`. Raises `Unusable`."""
    value = listed(value)
    if not isinstance(value, list) or not value:
        raise Unusable(f"{column} is not a list of messages", f"got {short(value)}")
    messages: list[Message] = []
    for item in value:
        message = _message(item)
        before = messages[-1] if messages else None
        if message.role != _CALL:
            messages.append(message)
        elif before and before.role == "assistant" and before.weight == message.weight:
            # A turn may call several times, and say something first.
            calls = [*before.extra.get("tool_calls", ()), *message.extra["tool_calls"]]
            messages[-1] = before._replace(extra={**before.extra, "tool_calls": calls})
        else:
            messages.append(message._replace(role="assistant"))
    return tuple(messages)


def with_roles(value: Any, roles: Mapping[str, str]) -> Any:
    """Give messages, if `value` is a list of them, the roles that `roles` maps theirs to."""
    messages = listed(value)
    if not isinstance(messages, list) or not all(isinstance(item, dict) for item in messages):
        return value
    names = [str(_first(item, _ROLE)).strip().lower() for item in messages]
    return [
        {**item, "role": roles[name]} if name in roles else item
        for item, name in zip(messages, names, strict=True)
    ]


def _message(item: Any) -> Message:
    if not isinstance(item, dict):
        raise Unusable("a message is not an object", f"got {short(item)}")
    name = _first(item, _ROLE)
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        known = ", ".join(ROLES)
        line = f"map it with --roles.{name} user, or another of " if _is_word(name) else "known: "
        raise Unusable(f"role {name!r:.40} is not known", line + known)
    content, weight = _first(item, _CONTENT), _weight(item)
    # A null key is an absent one, as for every column; what lies deeper is kept as it is.
    extra = {key: value for key, value in item.items() if value is not None and key not in _READ}
    if role == _CALL:
        extra["tool_calls"] = [_call(call) for call in _calls_in(content)]
        return Message(role, "", weight=weight, extra=extra)
    if "tool_calls" in extra:
        extra["tool_calls"] = sequence(extra["tool_calls"])
    if not extra.get("tool_calls", True):
        del extra["tool_calls"]
    calls = extra.get("tool_calls")
    if calls is not None and not (
        isinstance(calls, list) and all(isinstance(call, dict) for call in calls)
    ):
        raise Unusable("tool_calls is not a list of objects", f"got {short(calls)}")
    if content is None and calls:
        content = ""
    text, thought = _contents(content)
    if thought:
        if any(extra.get(field) for field in thinking.FIELDS):
            raise Unusable("thinking both in content and in a field", f"got {short(thought)}")
        extra["reasoning_content"] = thought
    return Message(role, text, weight=weight, extra=extra)


def _contents(content: Any) -> tuple[str, str]:
    """Read (text, thinking) of content: text, or parts of both kinds, each joined in order."""
    if isinstance(content, str):
        return content, ""
    parts = listed(content)
    if not isinstance(parts, list):
        raise Unusable("content is not text", f"got {short(content)}")
    texts = {"text": "", "thinking": ""}
    for part in parts:
        if not isinstance(part, dict):
            raise Unusable("content holds a part that is not text", f"got {short(part)}")
        kind = str(part.get("type") or "text")
        if medium := next((MEDIA[word] for word in MEDIA if word in kind), None):
            raise Unusable(f"content holds {medium}; only text is trained", f"got {short(part)}")
        value = part.get(kind, part.get("text"))
        if kind == "thinking" and isinstance(value, list):  # text parts once more, as Mistral's
            value, _ = _contents(value)
        if kind not in texts or not isinstance(value, str):
            raise Unusable("content holds a part that is not text", f"got {short(part)}")
        if _weight(part) is not None:
            raise Unusable("a part of a message has its own weight", f"got {short(part)}")
        texts[kind] += value
    return texts["text"], texts["thinking"]


def _calls_in(content: Any) -> list[Any]:
    """Read the calls of a `tool_call` turn: an object or a list of them, or their JSON text."""
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        raise Unusable("a function call is not JSON", f"got {short(content)}") from None
    return calls if isinstance(calls, list) and calls else [calls]


def _call(call: Any) -> dict[str, Any]:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise Unusable("a function call has no name", f"got {short(call)}")
    function = {"name": call["name"], "arguments": call.get("arguments", {})}
    return {"type": "function", "function": function}


def _is_word(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w-]{1,40}", name) is not None


def _first(item: Fields, names: tuple[str, ...]) -> Any:
    """Return the value of the first of `names` that is there and not null."""
    return next((item[name] for name in names if item.get(name) is not None), None)


def _weight(item: Fields) -> float | None:
    """Read `weight`, under any of the names in use; `masked` says the opposite."""
    weights = [(name, item[name]) for name in _WEIGHT if item.get(name) is not None]
    if len(weights) > 1:
        raise Unusable("a message has two weights", " and ".join(name for name, _ in weights))
    if not weights:
        return None
    name, value = weights[0]
    if not isinstance(value, bool | int | float) or not 0 <= value <= _LARGEST:
        raise Unusable(f"{name} is not a number >= 0 within float32", f"got {short(value)}")
    return float(not value) if name == "masked" else float(value)


_CALL = "tool_call"  # the role whose text is the call
# By a word of the type of a part: image_url, input_audio, ...
MEDIA = {"image": "an image", "audio": "audio", "video": "a video", "file": "a file"}
_ROLE = ("role", "from")
_CONTENT = ("content", "value")
_LARGEST = float(np.finfo(np.float32).max)  # weights are stored so
_WEIGHT = ("weight", "loss_weight", "loss", "train", "masked")
# Keys of a message that are read here. `input` is Alpaca's: our own templates give it a place that
# no message of a chat has.
_READ = frozenset((*_ROLE, *_CONTENT, *_WEIGHT, "input"))
