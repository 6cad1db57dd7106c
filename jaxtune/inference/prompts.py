"""Prompts as users write them: text, or a list of messages, in a file or in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jaxtune.config import DataError
from jaxtune.data import sources
from jaxtune.data.formats import to_conversation
from jaxtune.data.readers import EmptyError
from jaxtune.data.schema import Conversation, Dropped, Message

_KINDS = {bool: "true or false", int: "a number", float: "a number"}  # of JSON, beside objects


class Prompt(NamedTuple):
    """A prompt as its source has it, and as a conversation."""

    source: Any
    conversation: Conversation


def text_prompt(text: str) -> Prompt:
    """Make a conversation of one message of the user."""
    return Prompt(text, Conversation((Message("user", text),)))


def read_prompts(path: str, roles: Mapping[str, str]) -> Iterator[Prompt]:
    """Read a file of objects with 'prompt' or 'messages'. Raises: ConfigError, DataError."""
    try:
        for record in sources.read(sources.find(path)):
            yield parse_prompt(record.where, record.fields, roles)
    except EmptyError:
        raise DataError(
            f"{path}: there is no prompt in it. Expected an object for each, with 'prompt' (text) "
            "or 'messages' (a list)."
        ) from None


def parse_prompt(
    where: str, fields: Mapping[str, Any], roles: Mapping[str, str] | None = None
) -> Prompt:
    """Parse one object; errors begin with `where`. Raises: DataError."""
    prompt = fields.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        turns = [{"role": "user", "content": prompt}]
        return Prompt(prompt, _conversation(where, turns, fields, None))
    messages = prompt if isinstance(prompt, list) else fields.get("messages")
    if messages is None:
        if not isinstance(prompt, str | None):
            raise DataError(
                f"{where}: 'prompt' is {_KINDS.get(type(prompt), 'an object')}; expected text, or "
                "a list of messages."
            )
        empty = isinstance(prompt, str) and not prompt.strip()
        raise DataError(
            f"{where}: expected 'prompt' (text) or 'messages' (a list); the record has: "
            f"{', '.join(fields) or 'nothing'}{', prompt empty' if empty else ''}."
        )
    noun = _conversation(where, messages, fields, roles)
    if noun.messages[-1].role == "assistant":
        raise DataError(f"{where}: ends with an answer. End it with what is to be answered.")
    return Prompt(messages, noun)


def _conversation(
    where: str, messages: Any, fields: Mapping[str, Any], roles: Mapping[str, str] | None
) -> Conversation:
    """Read messages with the tools and the template arguments that stand beside them."""
    beside = {name: fields.get(name) for name in ("tools", "chat_template_kwargs")}
    noun = to_conversation({"messages": messages, **beside}, where, roles)
    if isinstance(noun, Dropped):
        raise DataError(f"{where}: {', '.join(filter(None, noun))}.")
    return noun
