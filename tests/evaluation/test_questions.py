"""The reference is what was trained: a model that has learnt the data by heart is right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from data.chat_templates import THINKING, THINKING_KEY, TOOL_CALLING
from data.made import NAMES, adds_bos, byte_level_backend, save, sentencepiece_backend

from jaxtune.config import DataError, DatasetConfig
from jaxtune.data.dataset import Dataset, open_dataset
from jaxtune.data.preprocess import PreprocessConfig
from jaxtune.data.templating.answer_text import affixes
from jaxtune.data.templating.template import resolve
from jaxtune.data.tokenize import tokenize_prompt
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evaluation.questions import Question, questions_of
from jaxtune.evaluation.scores.answers import AnswerPair, answer_scores
from jaxtune.inference.generate import Detokenizer
from jaxtune.inference.load import TextCodec

# The generation prompt begins the reasoning, and answers are written with it.
BEGUN = """{%- for message in messages -%}
{{- "<|im_start|>" + message.role + "\n" -}}
{%- if message.role == "assistant" -%}
{{- "<think>\n" + (message.reasoning_content or "") + "\n</think>\n\n" -}}
{%- endif -%}
{{- message.content + "<|im_end|>\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\n<think>\n" -}}{%- endif -%}"""
ONE = [{"role": "user", "content": "Capital?"}, {"role": "assistant", "content": "Paris, yes."}]
TWO = [*ONE, {"role": "user", "content": "Really?"}, {"role": "assistant", "content": "Really."}]
THOUGHT = [ONE[0], {**ONE[1], "reasoning_content": "A capital\nis turns."}]
CALLED = [
    ONE[0],
    {"role": "assistant", "content": "Let me look.",
     "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"x": 1}}}]},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


@pytest.fixture(scope="module", params=["bytes", "first", "always", "legacy"])
def tokenizer(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    kind = request.param
    backend = byte_level_backend() if kind == "bytes" else sentencepiece_backend(kind)
    return save(tmp_path_factory.mktemp(kind), adds_bos(backend), **NAMES)


def opened(
    folder: Path, tokenizer: Tokenizer, template: str, /, *records: dict[str, Any], **entry: Any
) -> tuple[Dataset, TextCodec, list[DatasetConfig]]:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    entries = [DatasetConfig(path=str(file), **entry)]
    codec = TextCodec(tokenizer, resolve(template, tokenizer))
    data = open_dataset(entries, PreprocessConfig(tokenizer, codec.template), processes=1)
    return data, codec, entries


def learnt_by_heart(data: Dataset, question: Question) -> AnswerPair:
    """What a model says that goes on as a trained row does."""
    tokenizer, template = question.codec
    turns = question.conversation
    prompt = tokenize_prompt(template, tokenizer, turns.messages, tools=turns.tools)
    rows = [data.tokens(i).ids.tolist() for i in range(len(data))]
    (rest,) = (row[len(prompt) :] for row in rows if row[: len(prompt)] == prompt)
    ids = rest[: rest.index(template.stop_id)]
    text = Detokenizer(tokenizer, template.stop_id, (), affixes(template, tokenizer))
    _, answer = text.add(ids, "stop")
    assert answer is not None
    tokens = tokenizer.encode(question.spoken(answer.text).strip())
    return AnswerPair(
        question.reference, answer.text, True, question.reference_ids, tokens, len(ids)
    )


@pytest.mark.parametrize(
    ("template", "messages", "spoken"),
    [
        (THINKING, ONE, "Paris, yes."),
        (THINKING, TWO, "Really."),
        (THINKING, [ONE[0], {**ONE[1], "content": "<think>\nHm.\n</think>\n\nParis."}], "Paris."),
        (THINKING_KEY, THOUGHT, "Paris, yes."),
        (BEGUN, THOUGHT, "Paris, yes."),
        (BEGUN, TWO, "Really."),
        (TOOL_CALLING, CALLED, "Let me look.\n<call>"),
        ("qwen", CALLED, "Let me look.\n<tool_call>"),
        ("mistral", CALLED, "Let me look.[TOOL_CALLS]"),
        *((name, TWO, "Really.") for name in ("vicuna", "llama2", "alpaca", "chatml")),
        ("Q: {instruction} A: {output} </s>", TWO, "Really."),
    ],
    ids=lambda value: value[:9] if isinstance(value, str) else None,
)
def test_the_answer_that_was_trained_is_right(
    tmp_path: Path, tokenizer: Tokenizer, template: str, messages: Sequence[Any], spoken: str
) -> None:
    tools = {"tools": TOOLS} if messages is CALLED else {}
    data, codec, entries = opened(tmp_path, tokenizer, template, {"messages": messages, **tools})
    (question,) = questions_of(entries, data, codec, 5)
    said = learnt_by_heart(data, question)
    assert said.answer == said.reference
    assert question.spoken(said.reference).startswith(spoken)
    found = {name: score.point() for name, score in answer_scores([said]).items()}
    assert (found["exact_match"], found["length_ratio"], found["chrf"]) == (1.0, 1.0, 100.0)


def test_weights_change_nothing_of_what_is_expected(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The first answer alone is trained, the last is still asked for."""
    turns = [dict(turn) for turn in TWO]
    turns[1]["weight"], turns[3]["weight"] = 0.5, 0
    data, codec, entries = opened(tmp_path, tokenizer, "vicuna", {"messages": turns})
    (question,) = questions_of(entries, data, codec, 5)
    assert question.reference == "Really."


def test_a_data_set_with_a_template_of_its_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data, codec, entries = opened(
        tmp_path, tokenizer, "vicuna", {"messages": TWO}, template="chatml"
    )
    (question,) = questions_of(entries, data, codec, 5)
    assert question.codec.template.name == "chatml"
    assert learnt_by_heart(data, question).exact


def test_without_words_there_is_no_question(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A call alone, and thoughts alone."""
    call = [CALLED[0], {**CALLED[1], "content": ""}]
    data, codec, entries = opened(
        tmp_path, tokenizer, TOOL_CALLING, {"messages": call, "tools": TOOLS}
    )
    with pytest.raises(DataError, match="has no question to answer"):
        questions_of(entries, data, codec, 5)
    thoughts = [ONE[0], {**ONE[1], "content": "<think>\nHm.\n</think>"}]
    data, codec, entries = opened(tmp_path, tokenizer, "chatml", {"messages": thoughts})
    with pytest.raises(DataError, match="has no question to answer"):
        questions_of(entries, data, codec, 5)
