"""Control tokens that a message holds as text: masked while it is rendered, then put back.

One private character stands for each typed token, so that no template, split or trim can move it
unseen. Knows no template: it is handed the pattern of what steers the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtune.data.schema import Dropped, Message, Span
from jaxtune.data.templating import jinja

Row = tuple[Span, ...]


class Said(NamedTuple):
    """A conversation as it is rendered: `typed` names the control token each private character of
    `messages` and `tools` stands for; `plain` and `plain_tools` still have the tokens themselves.
    """

    messages: tuple[Message, ...]
    tools: Any
    typed: Mapping[str, str]
    plain: tuple[Message, ...]
    plain_tools: Any


class Unlocated(jinja.TemplateFailed):
    """With the tokens put back, the text is not what the template makes of the conversation."""

    reason = "control tokens typed in a message cannot be found in the rendered text"


def mask(control: re.Pattern[str], messages: Sequence[Message], tools: Any) -> Said:
    """The conversation with a private character, in none of its texts, for each typed token."""
    plain = tuple(messages)
    values = [(m.content, m.input, m.extra) for m in plain]
    texts = "\0".join(strings([values, tools]))
    found = dict.fromkeys(match[0] for match in control.finditer(texts))
    if not found:
        return Said(plain, tools, {}, plain, tools)
    free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in texts)
    stand_in = dict(zip(found, free, strict=False))

    def masked_in(value: Any) -> Any:
        if isinstance(value, str):
            return control.sub(lambda match: stand_in[match[0]], value)
        if isinstance(value, Mapping):
            return {masked_in(key): masked_in(inner) for key, inner in value.items()}
        return [masked_in(inner) for inner in value] if isinstance(value, list | tuple) else value

    masked = [
        message._replace(content=masked_in(content), input=masked_in(given), extra=masked_in(extra))
        for message, (content, given, extra) in zip(plain, values, strict=True)
    ]
    typed = {character: token for token, character in stand_in.items()}
    return Said(tuple(masked), masked_in(tools), typed, plain, tools)


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from strings(key)
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)


def unmask(text: str, typed: Mapping[str, str]) -> str:
    """The text with the tokens themselves."""
    for character, token in typed.items():
        text = text.replace(character, token)
    return text


def take_apart(row: Row, typed: Mapping[str, str], control: re.Pattern[str]) -> Row | Dropped:
    """Puts typed control tokens back as text, and says where each is to be taken apart."""
    if not typed:
        return row
    spans = []
    for span in row:
        text, breaks = "", []
        for part in re.split("([" + "".join(typed) + "])", span.text):
            token = typed.get(part, "")
            if len(token) == 1:
                return Dropped(Unlocated.reason, f"{token!r} cannot be taken apart")
            start = len(text)
            text += token or part
            # Behind its first character; again, should another control token begin in the rest.
            while found := control.search(token):
                breaks.append(start + found.start() + 1)
                start, token = start + found.start() + 1, token[found.start() + 1 :]
        spans.append(span._replace(text=text, breaks=tuple(breaks)))
    return tuple(spans)
