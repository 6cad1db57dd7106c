"""Examples before a conversation: where they stand, and that none asks what it asks itself."""

from __future__ import annotations

from typing import Any

import pytest
from data.chat_templates import HEADERS, THINKING
from data.conversations import text
from transformers.utils.chat_template_utils import render_jinja_template

from jaxtune.data.in_prompt import FewShotExample, as_example, behind_examples
from jaxtune.data.schema import Conversation, Document, Dropped, Message
from jaxtune.data.templating.masking import render
from jaxtune.data.templating.template import resolve
from jaxtune.data.tokenizer import Tokenizer

SYSTEM = Message("system", "Be brief.")


def asked(question: str, answer: str = "Yes.") -> tuple[Message, Message]:
    return Message("user", question), Message("assistant", answer)


FIRST, SECOND, SPARE = (FewShotExample(asked(f"Example {i}?", f"It is {i}.")) for i in range(3))
EXAMPLES = (FIRST, SECOND, SPARE)


def test_examples_stand_behind_the_message_of_a_developer_too() -> None:
    lead = Message("developer", "Be brief.")
    noun = behind_examples(Conversation((lead, *asked("Now?"))), EXAMPLES)
    assert noun.messages[:2] == (lead, FIRST.messages[0])
    example = as_example(Conversation((lead, *FIRST.messages)))
    assert example == FIRST


def test_examples_stand_behind_the_system_message_as_prompt(byte_level: Tokenizer) -> None:
    noun = behind_examples(Conversation((SYSTEM, *asked("Now?"))), EXAMPLES)
    assert noun.messages == (SYSTEM, *FIRST.messages, *SECOND.messages, *asked("Now?"))
    template = resolve(HEADERS, byte_level)
    (row,) = render(template, noun)
    (expected,), _ = render_jinja_template(
        [[{"role": m.role, "content": m.content} for m in noun.messages]], chat_template=HEADERS
    )
    assert text(row) == expected
    assert [span.text for span in row if span.weight] == ["Yes.<|im_end|>"]


def test_a_template_that_rewrites_history_shows_them_as_history(byte_level: Tokenizer) -> None:
    noun = behind_examples(Conversation(asked("Now?")), EXAMPLES)
    rows = render(resolve(THINKING, byte_level), noun)
    assert [sum("Example" in span.text for span in row) > 0 for row in rows] == [True]
    assert [span.text for span in rows[0] if span.weight][-1].endswith("Yes.<|im_end|>")


@pytest.mark.parametrize(("own", "shown"), [(FIRST, (SECOND, SPARE)), (SECOND, (FIRST, SPARE)),
                                            (SPARE, (FIRST, SECOND))])  # fmt: skip
def test_what_is_asked_itself_is_no_example(
    own: FewShotExample, shown: tuple[FewShotExample, ...]
) -> None:
    """By its questions: another answer to them would be copied too."""
    noun = Conversation((SYSTEM, own.messages[0], Message("assistant", "Another answer.")))
    found = behind_examples(noun, EXAMPLES)
    assert found.messages[1:5] == tuple(m for example in shown for m in example.messages)
    assert found.context == 5


@pytest.mark.parametrize(
    ("noun", "is_example"),
    [
        (Conversation((SYSTEM, *asked("Q?"))), True),
        (Conversation((*asked("Q?"), *asked("And?"))), True),
        (Conversation((*asked("Q?"), Message("user", "And?"))), False),
        (Conversation((Message("user", "Q?"), Message("assistant", "Bad.", weight=0.0))), False),
        (Conversation(asked("Q?"), tools=({"name": "f"},)), False),
        (Conversation((Message("user", "Q?"), Message("assistant", "A", extra={"thinking": "B"}))),
         False),
        (Conversation((SYSTEM,)), False),
        (Document("Words."), False),
        (Dropped("no answer"), False),
    ],
)  # fmt: skip
def test_only_plain_answers_that_are_trained_are_examples(noun: Any, is_example: bool) -> None:
    example = as_example(noun)
    assert (example is not None) == is_example
    if example is not None:
        assert example.messages == tuple(m for m in noun.messages if m.role != "system")
