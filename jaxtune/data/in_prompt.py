"""Conversations as examples in the prompt of another: turns before its own, behind its system."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxtune.data.schema import SYSTEM_ROLES, Conversation, Message


class FewShotExample(NamedTuple):
    """The turns of a conversation that ends with an answer, without its system message."""

    messages: tuple[Message, ...]

    @property
    def questions(self) -> tuple[str, ...]:
        return tuple(f"{m.content}\n{m.input}" for m in self.messages if m.role == "user")


def as_example(noun: object) -> FewShotExample | None:
    """Take a conversation in plain words, all of it to be imitated; None for any other."""
    if not isinstance(noun, Conversation) or noun.tools:
        return None
    messages = noun.messages[_lead(noun) :]
    plain = all(
        m.role in ("user", "assistant") and m.content.strip() and not m.extra and m.weight != 0
        for m in messages
    )
    if not plain or not messages or messages[-1].role != "assistant":
        return None
    return FewShotExample(tuple(message._replace(weight=None) for message in messages))


def behind_examples(noun: Conversation, examples: Sequence[FewShotExample]) -> Conversation:
    """Put all but the last of `examples` before the turns of a conversation, as prompt.

    One that has the conversation's own questions gives its place to the last.
    """
    lead = _lead(noun)
    own = FewShotExample(noun.messages[lead:]).questions
    shown = [example for example in examples if example.questions != own][: len(examples) - 1]
    before = tuple(message for example in shown for message in example.messages)
    messages = (*noun.messages[:lead], *before, *noun.messages[lead:])
    return noun._replace(messages=messages, context=max(noun.context, lead) + len(before))


def _lead(noun: Conversation) -> int:
    """Count the system messages that a conversation begins with."""
    roles = [message.role for message in noun.messages]
    return next((i for i, role in enumerate(roles) if role not in SYSTEM_ROLES), len(roles))
