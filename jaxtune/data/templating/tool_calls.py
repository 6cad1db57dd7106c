"""The tool calls of a message: their arguments, the forms that templates take them in, and checks.

Arguments come as an object or as its JSON text. Templates take one or the other, or both; what a
template cannot show as it came is given to it in the other form (`CallForm`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jaxtune.data.schema import Message
from jaxtune.data.templating.literal_special_tokens import strings
from jaxtune.data.templating.rendered_checks import appears, squeeze


class CallForm(NamedTuple):
    """A template's way to take calls. Neither `objects` nor `texts`: it shows no calls."""

    objects: bool = False  # it shows arguments that are objects
    texts: bool = False  # it shows JSON text as it is; others would quote it once more
    null_content: bool = False  # it shows calls only of a message whose content is null
    single: bool = False  # of several calls it shows the first

    @property
    def shown(self) -> bool:
        """Tell whether the template shows calls at all."""
        return self.objects or self.texts

    def given(self, message: Message) -> Message:
        """Return the message with its calls in a form that the template shows.

        Empty arguments (none, null, a blank text) are an empty object.
        """
        calls = message.extra.get("tool_calls")
        if not calls:
            return message
        converted = [self._given(call) for call in calls]
        extra: dict[str, Any] = {**message.extra, "tool_calls": converted}
        if self.null_content and not message.content:
            extra["content"] = None
        return message._replace(extra=extra)

    def _given(self, call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": self._given(call["function"])}
        if "name" not in call:
            return call
        arguments = call.get("arguments")
        if _is_empty(arguments):
            arguments = "{}" if isinstance(arguments, str) else {}
        if self.objects and not self.texts:
            arguments = _as_object(arguments)
        elif self.texts and not self.objects:
            arguments = _as_text(arguments)
        return {**call, "arguments": arguments}

    def shows(self, message: Message, words: str) -> bool:
        """Tell whether squeezed text has the names and arguments of the message's calls."""
        calls = list(calls_of(message))
        for function in calls[:1] if self.single else calls:
            arguments = function.get("arguments")
            if isinstance(arguments, str):
                if squeeze(arguments) not in words:
                    return False
                arguments = None
            if not all(appears(text, words) for text in strings([function.get("name"), arguments])):
                return False
        return True


def calls_of(message: Message) -> Iterator[Mapping[str, Any]]:
    """Yield the functions called, {"name", "arguments"}, without what is around them."""
    calls = message.extra.get("tool_calls") or ()
    for call in calls if isinstance(calls, list | tuple) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            yield function


def broken_arguments(message: Message) -> str | None:
    """Show the first arguments that are no JSON object; None if all are, or are empty."""
    for function in calls_of(message):
        arguments = function.get("arguments")
        if not (_is_empty(arguments) or isinstance(_as_object(arguments), Mapping)):
            return f"{arguments!r:.60}"
    return None


def _is_empty(arguments: Any) -> bool:
    return arguments is None or (isinstance(arguments, str) and not arguments.strip())


def _as_object(arguments: Any) -> Any:
    """Parse arguments given as JSON text; return anything else unchanged."""
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, Mapping) else arguments


def _as_text(arguments: Any) -> Any:
    """Write arguments given as an object as JSON text."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
