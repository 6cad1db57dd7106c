"""What a model has said goes back into its next prompt as training has it, blank by blank.

The proof: a model that says the first answer of a trained conversation, token for token, is asked
the second question with ids that begin the trained row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from data.chat_templates import BRACKETS_MERGING, TRIMMING_DATED
from data.made import NAMES, adds_bos, byte_level_backend, save, sentencepiece_backend

from jaxtune.data.schema import Conversation, Dropped, Message
from jaxtune.data.templating.answer_text import affixes, text_of
from jaxtune.data.templating.masking import render
from jaxtune.data.templating.template import Template, resolve
from jaxtune.data.tokenize import tokenize_prompt, tokenize_rows
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.inference.generate import Detokenizer, Generation
from jaxtune.repl import history

TURNS = ("Name a prime.", "Seven, I think.", "Another?", "Eleven.")
STRING = "USER: {instruction}\n{input}\nASSISTANT: {output}"
BLANK_BEFORE_STOP = "Q: {instruction} A:{output} </s>\n"
TEMPLATES = ["vicuna", "llama2", "mistral", "chatml", "qwen", "plain", STRING, BLANK_BEFORE_STOP,
             BRACKETS_MERGING, TRIMMING_DATED]  # fmt: skip
# A header that inference does not feed, and an empty reasoning that stays in history.
HEADED = """{%- for message in messages -%}
{{- "<|im_start|>" + message.role -}}
{{- "\n[final] " if message.role == "assistant" else "\n" -}}
{{- message.content + "<|im_end|>\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant" -}}{%- endif -%}"""


@pytest.fixture(scope="module", params=["bytes", "first", "always", "legacy"])
def tokenizer(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    kind = request.param
    backend = byte_level_backend() if kind == "bytes" else sentencepiece_backend(kind)
    return save(tmp_path_factory.mktemp(kind), adds_bos(backend), **NAMES)


def messages(turns: Sequence[str]) -> tuple[Message, ...]:
    roles = ("user", "assistant") * len(turns)
    return tuple(Message(role, text) for role, text in zip(roles, turns, strict=False))


def trained(template: Template, tokenizer: Tokenizer, turns: Sequence[str]) -> Any:
    """(the ids of the row, those of its first answer without the end)."""
    (row,) = render(template, Conversation(messages(turns)))
    assert not isinstance(row, Dropped)
    (found,) = tokenize_rows([row], tokenizer)
    assert not isinstance(found, Dropped), found
    ids, weights = found.tokens
    start = int((weights > 0).argmax())
    end = start + int((ids[start:] == template.stop_id).argmax())
    return ids.tolist(), ids[start:end].tolist()


def streamed(
    template: Template, tokenizer: Tokenizer, ids: Sequence[int]
) -> tuple[str, Generation]:
    """What is shown while an answer comes token by token, and the answer."""
    text = Detokenizer(tokenizer, template.stop_id, (), affixes(template, tokenizer))
    pieces = [text.add([token], None)[0] for token in ids]
    last, answer = text.add([], "stop")
    assert answer is not None
    return "".join([*pieces, last]), answer


@pytest.mark.parametrize("name", [*TEMPLATES, HEADED], ids=lambda name: name[:12])
@pytest.mark.parametrize("said", [TURNS[1], " a blank before", "a blank behind ", "é 日本 🎉"])
def test_the_next_prompt_begins_the_trained_row(tokenizer: Tokenizer, name: str, said: str) -> None:
    template = resolve(name, tokenizer)
    row, answer = trained(template, tokenizer, (TURNS[0], said, *TURNS[2:]))
    shown, found = streamed(template, tokenizer, answer)
    assert shown == found.text
    assert (found.stopped, found.tokens) == (True, len(answer))
    talk = history.answered(history.Talk(), TURNS[0], {"m": found.text})
    prompt = tokenize_prompt(template, tokenizer, history.messages(talk, "m", TURNS[2]))
    assert row[: len(prompt)] == prompt
    if said == TURNS[1]:
        assert found.text == said


def test_what_is_not_the_templates_own_stays(tokenizer: Tokenizer) -> None:
    """An answer without the template's blanks; one that was cut; one that goes on from a text."""
    template = resolve(BLANK_BEFORE_STOP, tokenizer)
    left_out = affixes(template, tokenizer)
    assert left_out == ("", " ")
    assert left_out.content("Seven.") == "Seven."
    ids = tokenizer.encode("a Seven ")[1:]
    text = Detokenizer(tokenizer, template.stop_id, (), left_out)
    shown = "".join(text.add([token], None)[0] for token in ids)
    last, answer = text.add([], "length")
    assert answer is not None
    assert shown + last == answer.text == text_of(tokenizer, ids, behind=template.stop_id)
    assert answer.text.endswith(" ")


def test_before_content_nothing_is_shown_before_it_is_known(byte_level: Tokenizer) -> None:
    template = resolve(HEADED, byte_level)
    assert affixes(template, byte_level) == ("\n[final] ", "")
    text = Detokenizer(byte_level, template.stop_id, (), affixes(template, byte_level))
    pieces = [text.add([token], None)[0] for token in byte_level.encode("\n[final] So it is.")]
    assert "".join(pieces) == "So it is."
    other = Detokenizer(byte_level, template.stop_id, (), affixes(template, byte_level))
    pieces = [other.add([token], None)[0] for token in byte_level.encode("\n[first] So it is.")]
    assert "".join(pieces) == "\n[first] So it is."


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save(tmp_path_factory.mktemp("bytes"), byte_level_backend(), **NAMES)
