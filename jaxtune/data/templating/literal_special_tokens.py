"""Special tokens that a message holds as text: masked while it is rendered, then put back.

One private character stands for each of them, so that no template, split or trim can move it
unseen. Knows no template: it is handed the pattern of what steers the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtune.data.schema import Dropped, Message, Span
from jaxtune.data.templating import jinja

Row = tuple[Span, ...]


class MaskedConversation(NamedTuple):
    """A conversation as it is rendered.

    `literals` names the special token that each private character of `messages` and `tools` stands
    for; `plain` and `plain_tools` still have the tokens themselves.
    """

    messages: tuple[Message, ...]
    tools: Any
    literals: Mapping[str, str]
    plain: tuple[Message, ...]
    plain_tools: Any


class LiteralTokensNotFound(jinja.TemplateFailed):
    """A text that, with the tokens put back, is not what the template makes of the conversation."""

    reason = "literal special tokens of a message cannot be found in the rendered text"


def mask(special: re.Pattern[str], messages: Sequence[Message], tools: Any) -> MaskedConversation:
    """Put a private character, one that is in no text, in place of each literal special token."""
    plain = tuple(messages)
    values = [(m.content, m.input, m.extra) for m in plain]
    texts = "\0".join(strings([values, tools]))
    found = dict.fromkeys(match[0] for match in special.finditer(texts))
    if not found:
        return MaskedConversation(plain, tools, {}, plain, tools)
    free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in texts)
    stand_in = dict(zip(found, free, strict=False))

    def masked_in(value: Any) -> Any:
        if isinstance(value, str):
            return special.sub(lambda match: stand_in[match[0]], value)
        if isinstance(value, Mapping):
            return {masked_in(key): masked_in(inner) for key, inner in value.items()}
        return [masked_in(inner) for inner in value] if isinstance(value, list | tuple) else value

    masked = [
        message._replace(content=masked_in(content), input=masked_in(given), extra=masked_in(extra))
        for message, (content, given, extra) in zip(plain, values, strict=True)
    ]
    literals = {character: token for token, character in stand_in.items()}
    return MaskedConversation(tuple(masked), masked_in(tools), literals, plain, tools)


def strings(value: Any) -> Iterator[str]:
    """Yield every string in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from strings(key)
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)


def unmask(text: str, literals: Mapping[str, str]) -> str:
    """Put the tokens themselves back."""
    for character, token in literals.items():
        text = text.replace(character, token)
    return text


def take_apart(row: Row, literals: Mapping[str, str], special: re.Pattern[str]) -> Row | Dropped:
    """Put literal special tokens back as text, and mark where each is to be taken apart."""
    if not literals:
        return row
    spans = []
    for span in row:
        text, breaks = "", []
        for part in re.split("([" + "".join(literals) + "])", span.text):
            token = literals.get(part, "")
            if len(token) == 1:
                return Dropped(LiteralTokensNotFound.reason, f"{token!r} cannot be taken apart")
            start = len(text)
            text += token or part
            # Behind its first character; again, should another special token begin in the rest.
            while found := special.search(token):
                breaks.append(start + found.start() + 1)
                start, token = start + found.start() + 1, token[found.start() + 1 :]
        spans.append(span._replace(text=text, breaks=tuple(breaks)))
    return tuple(spans)
