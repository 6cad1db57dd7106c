"""A generated answer -> the content of a message, without what the template writes around it.

    vicuna                       trained " Hello."     content "Hello."
    Q: {instruction}{output} </s>        "Hello. "             "Hello."

A history holds content. An answer that kept what the template writes would have it twice there, and
the next prompt would not begin as the row does that training makes of the conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxtune.data.schema import Conversation, Dropped
from jaxtune.data.templating import jinja
from jaxtune.data.templating.masking import render
from jaxtune.data.templating.probes import ANSWER, QUESTION
from jaxtune.data.templating.template import Template
from jaxtune.data.tokenize import tokenize_rows
from jaxtune.data.tokenizer import Tokenizer


class Affixes(NamedTuple):
    """A template's text before the content of an answer, and between that and its end."""

    before: str = ""
    behind: str = ""

    def content(self, answer: str) -> str:
        """Strip a whole answer to its content."""
        return answer.removeprefix(self.before).removesuffix(self.behind)


def affixes(template: Template, tokenizer: Tokenizer) -> Affixes:
    """Learn the affixes from an answer as it is trained.

    They are blanks as this tokenizer gives them back, and other text if the template would write it
    twice. Nothing if the template takes it out of content itself, as that of a reasoning model does
    with an empty reasoning.
    """
    ids = answer_ids(template, tokenizer, Conversation((QUESTION, ANSWER)))
    if ids is None:
        return Affixes()
    answer = text_of(tokenizer, ids, behind=template.stop_id)
    before, found, behind = answer.partition(ANSWER.content)
    if not found or ((before + behind).strip() and _takes_out(template, answer)):
        return Affixes()
    return Affixes(before, behind)


def answer_ids(
    template: Template, tokenizer: Tokenizer, conversation: Conversation
) -> list[int] | None:
    """Tokenise what a model must say to end `conversation` with its last message, as it is trained.

    Without the end of turn. None if that cannot be.
    """
    messages = tuple(message._replace(weight=None) for message in conversation.messages)
    row = render(template, conversation._replace(messages=messages), train_on="last")[-1]
    (found,) = (row,) if isinstance(row, Dropped) else tokenize_rows([row], tokenizer)
    if isinstance(found, Dropped):
        return None
    ids, weights = found.tokens
    trained = list(map(int, ids[weights > 0]))
    while trained and trained[-1] in template.stop_ids:
        trained.pop()
    return trained


def text_of(tokenizer: Tokenizer, ids: Sequence[int], *, behind: int) -> str:
    """Decode `ids` behind the token `behind`: decoders drop a blank at the beginning of a text."""
    alone, whole = tokenizer.decode([behind]), tokenizer.decode([behind, *ids])
    return whole[len(alone) :] if whole.startswith(alone) else tokenizer.decode(ids)


def _takes_out(template: Template, answer: str) -> bool:
    """Tell whether the template writes the same for a whole answer as for its content."""
    try:
        return template.text((QUESTION, ANSWER._replace(content=answer))) == template.text(
            (QUESTION, ANSWER)
        )
    except jinja.TemplateFailed:
        return False
