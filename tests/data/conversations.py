"""Conversations of every shape, and what a template makes of them."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtune.data.schema import Conversation, Dropped, Message, Span
from jaxtune.data.templating.masking import render
from jaxtune.data.templating.template import Template

VICUNA = "USER: {instruction}\n{input}\nASSISTANT: {output}"
OURS = [
    "alpaca", "alpaca_original", "chatml", "llama2", "llama3", "mistral", "plain", "qwen", "vicuna",
    "zephyr", VICUNA,
]  # fmt: skip

ONE = [Message("user", "Name a prime."), Message("assistant", "Seven.")]
TWO = [*ONE, Message("user", "Another?"), Message("assistant", "Eleven.")]
SHAPES = {
    "one": ONE,
    "two": TWO,
    "three": [*TWO, Message("user", "Last?"), Message("assistant", "Thirteen.")],
    "system": [Message("system", "Be brief."), *TWO],
    "open end": [*TWO, Message("user", "And?")],
    "blanks": [Message("user", " q \n"), Message("assistant", "\n a b \n")],
    "same text": [Message("user", "Seven."), Message("assistant", "Seven.")] * 2,
    "unicode": [Message("user", "你好 🎉"), Message("assistant", "naïve — “yes”")],
    "double answer": [*ONE, Message("assistant", "Or eleven.")],
}


def rows(template: Template, messages: Sequence[Message], **options: str) -> tuple:
    return render(template, Conversation(tuple(messages)), **options)  # type: ignore[arg-type]


def only(template: Template, messages: Sequence[Message], **options: str) -> tuple[Span, ...]:
    (row,) = rows(template, messages, **options)
    assert not isinstance(row, Dropped), row
    return row


def text(row: Sequence[Span]) -> str:
    return "".join(span.text for span in row)


def trained(row: Sequence[Span]) -> list[str]:
    return [span.text for span in row if span.weight > 0]
