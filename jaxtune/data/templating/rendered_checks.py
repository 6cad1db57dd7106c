"""Check that rendered text has a message's text: blanks aside, and as it is or as JSON writes it.

Also the forms that the arguments of a tool call may take.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtune.data.schema import Message
from jaxtune.data.templating.literal_special_tokens import strings


def squeeze(text: str) -> str:
    """Take out white space: templates trim and join, and only what else is lost counts."""
    return "".join(text.split())


def appears(text: str, words: str) -> bool:
    """Tell whether squeezed `words` have `text`, as it is or as JSON writes it."""
    return squeeze(text) in words or any(
        squeeze(json.dumps(text, ensure_ascii=ascii)[1:-1]) in words for ascii in (False, True)
    )


def shows_calls(message: Message, words: str) -> bool:
    """Tell whether squeezed text has the names and arguments of the message's tool calls."""
    calls = message.extra.get("tool_calls")
    if not calls:
        return True
    for call in calls if isinstance(calls, list | tuple) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else call
        wanted = function
        if isinstance(function, Mapping):
            arguments = function.get("arguments")
            wanted = [function.get("name"), arguments]
            if isinstance(arguments, str) and isinstance(as_object(arguments), Mapping):
                wanted = function.get("name")
                if squeeze(arguments) not in words:  # quoted once more is not the same call
                    return False
        if not all(appears(text, words) for text in strings(wanted)):
            return False
    return True


def with_calls(message: Message, convert: Callable[[Any], Any]) -> Message:
    """Apply `convert` to the arguments of the message's tool calls."""
    calls = message.extra.get("tool_calls")
    if not isinstance(calls, Sequence):
        return message
    return message._replace(
        extra={**message.extra, "tool_calls": [_call(c, convert) for c in calls]}
    )


def _call(call: Any, convert: Callable[[Any], Any]) -> Any:
    if not isinstance(call, Mapping):
        return call
    inner = {k: _call(v, convert) if k == "function" else v for k, v in call.items()}
    return {**inner, **({"arguments": convert(call["arguments"])} if "arguments" in call else {})}


def as_object(arguments: Any) -> Any:
    """Parse arguments given as JSON text; return anything else unchanged."""
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
    return parsed if isinstance(parsed, Mapping) else arguments


def as_text(arguments: Any) -> Any:
    """Write arguments given as an object as JSON text."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
