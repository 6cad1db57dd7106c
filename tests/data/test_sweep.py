"""Chat templates x conversations x tokenizers against transformers, by an oracle of its own.

Rule: the ids are those of `apply_chat_template`; what is trained is what follows the generation
prompt up to the end of turn, for every answer; or the row is dropped, and which are is written down
here. The oracle knows only transformers: it renders, finds and decodes by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pytest
from data.chat_templates import FOREIGN
from data.conversations import SHAPES
from data.made import (
    NAMES,
    adds_bos,
    byte_level_backend,
    nasty_backend,
    save,
    sentencepiece_backend,
)

from jaxtune.data.schema import Conversation, Dropped, Message
from jaxtune.data.templating.masking import render
from jaxtune.data.templating.template import resolve
from jaxtune.data.tokenize import TokenizedRow, tokenize_prompt, tokenize_rows
from jaxtune.data.tokenizer import Tokenizer

CLOCK = {
    "type": "function",
    "function": {"name": "clock", "description": "Tells the time.", "parameters": {"tz": "str"}},
}


def call(**arguments: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "clock", "arguments": arguments}}


CALLS = Conversation(
    (
        Message("user", "When is it in Oslo and Lima?"),
        Message(
            "assistant",
            "Let me see.",
            extra={"tool_calls": [call(tz="Oslo"), call(tz="Li\nma")]},
        ),
        Message("tool", '{"now": "noon"}', extra={"name": "clock"}),
        Message("tool", "six", extra={"name": "clock"}),
        Message("assistant", "Noon and six."),
    ),
    (CLOCK,),
)  # fmt: skip
THOUGHTS = Conversation(
    (
        Message("user", "Name a prime."),
        Message("assistant", "Seven.", extra={"reasoning_content": "Small ones are known."}),
        Message("user", "Another?"),
        Message("assistant", "Eleven.", extra={"reasoning_content": "Larger than before."}),
    )
)
NOUNS = {name: Conversation(tuple(messages)) for name, messages in SHAPES.items()}
NOUNS |= {"calls": CALLS, "thoughts": THOUGHTS}

# Which are dropped, and why. Everything else must be trained.
REFUSED = "the template refuses the conversation"
NO_SYSTEM = "the template does not show the system message"
NO_TOOLS = "the template does not show the tools"
NO_THINKING = "the template does not show the thinking of the answer"
DROPPED = {
    **{
        (name, "calls"): NO_TOOLS
        for name in FOREIGN
        if name not in ("tool_calling", "tool_joining")
    },
    **{(name, "thoughts"): NO_THINKING for name in FOREIGN if name != "thinking_key"},
    **{(name, "calls"): REFUSED for name in ("renaming_refusing", "alternating_raising")},
    ("renaming_refusing", "system"): REFUSED,
    ("system_ignoring", "system"): NO_SYSTEM,
}
# The second of two answers in a row is refused; the first is trained.
UNTRAINED = [(name, "double answer") for name in ("renaming_refusing", "alternating_raising")]


class Reference(NamedTuple):
    tokenizer: Any  # transformers' own

    def text(self, noun: Conversation, upto: int | None = None, *, prompt: bool = False) -> str:
        return str(self._apply(noun, upto, prompt, tokenize=False))

    def ids(self, noun: Conversation) -> list[int]:
        return list(self._apply(noun, None, False, tokenize=True, return_dict=False))

    def _apply(self, noun: Conversation, upto: int | None, prompt: bool, **how: Any) -> Any:
        chat = [
            {"role": m.role, "content": m.content, **json.loads(json.dumps(m.extra))}
            for m in noun.messages[:upto]
        ]
        if "joining" in self.tokenizer.name_or_path:  # needs text where others need objects
            for message in chat:
                for each in message.get("tool_calls", ()):
                    each["function"]["arguments"] = json.dumps(each["function"]["arguments"])
        tools = list(noun.tools) if noun.tools else None
        return self.tokenizer.apply_chat_template(
            chat, tools=tools, add_generation_prompt=prompt, **how
        )

    def answers(self, noun: Conversation, stop: str) -> Iterator[tuple[str, str]]:
        """(what inference feeds, what must follow) of each answer that can be shown."""
        for i, message in enumerate(noun.messages):
            if message.role != "assistant":
                continue
            try:
                fed, whole = self.text(noun, i, prompt=True), self.text(noun, i + 1)
            except jinja2.TemplateError:  # the second of two answers in a row
                return
            header = "<|im_start|>assistant\n"
            if whole.startswith(fed) and message.content.strip() in whole[len(fed) :]:
                yield fed, whole[len(fed) : whole.index(stop, len(fed)) + len(stop)]
            elif fed.endswith(header):  # it rewrites the answer before
                yield fed, whole.rpartition(header)[2].rstrip()


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece", "nasty"])
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    backend = {
        "byte_level": byte_level_backend,
        "sentencepiece": lambda: sentencepiece_backend("first"),
        "nasty": nasty_backend,
    }[request.param]()
    return save(tmp_path_factory.mktemp(request.param), adds_bos(backend), **NAMES)


def trained_texts(result: TokenizedRow, tokenizer: Any, stop_id: int) -> list[str]:
    """Every run of trained tokens as text, runs also ending behind each end of turn."""
    ids, weights = result.tokens
    texts: list[str] = []
    run: list[int] = []
    for number, (token, weight) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
        if weight:
            run.append(token)
        if run and (not weight or token == stop_id or number == len(ids) - 1):
            # Decoded behind a token: decoders drop a blank where a text begins.
            texts.append(tokenizer.decode([stop_id, *run])[len(tokenizer.decode([stop_id])) :])
            run = []
    return texts


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("shape", NOUNS)
def test_every_row_is_right_or_dropped(kind: Tokenizer, name: str, shape: str) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(kind.folder)
    loaded.chat_template = FOREIGN[name].replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    loaded.name_or_path = name
    reference = Reference(loaded)
    template, noun = resolve(FOREIGN[name], kind), NOUNS[shape]
    produced = render(template, noun)
    reasons = {row.reason for row in produced if isinstance(row, Dropped)}
    assert reasons == ({DROPPED[name, shape]} if (name, shape) in DROPPED else set())
    spans = [row for row in produced if not isinstance(row, Dropped)]
    if not spans:
        return
    expected = list(reference.answers(noun, template.stop))
    if not reasons:
        lost = [reason for row in spans for reason in row[0].untrained]
        assert len(expected) + len(lost) == sum(m.role == "assistant" for m in noun.messages)
        assert not lost or (name, shape) in UNTRAINED
    found: list[str] = []
    for row, result in zip(spans, tokenize_rows(spans, kind), strict=True):
        assert isinstance(result, TokenizedRow), result
        assert not result.inexact
        ids, weights = result.tokens
        text = "".join(span.text for span in row)
        if not result.split:
            assert ids.tolist() == loaded(text, add_special_tokens=False).input_ids
            refused = (name, shape) in UNTRAINED
            if len(spans) == 1 and not refused and text == reference.text(noun):
                assert ids.tolist() == reference.ids(noun)
        assert loaded.decode(ids.tolist()).strip() == text.strip()
        answers = trained_texts(result, loaded, template.stop_id)
        found += answers
        starts = [i for i in np.flatnonzero(weights).tolist() if not weights[i - 1]]
        for start in starts:  # each behind exactly what inference feeds, token for token
            fed = [
                tokenize_prompt(template, kind, noun.messages[:i], tools=noun.tools)
                for i, message in enumerate(noun.messages)
                if message.role == "assistant"
            ]
            assert ids[:start].tolist() in fed
            before = loaded.decode(ids[:start].tolist()).strip()
            assert before in [prompt.strip() for prompt, _ in expected]
    assert found == [answer for _, answer in expected]
    if len(produced) == 1 and (name, shape) not in UNTRAINED:
        assert "".join(span.text for span in spans[0]) == reference.text(noun)


def test_the_sweep_is_as_wide_as_promised() -> None:
    assert len(FOREIGN) >= 12
    assert len(NOUNS) >= 8
    assert len(DROPPED) < len(FOREIGN) * len(NOUNS) / 4
