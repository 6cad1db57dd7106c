"""Real instructions, a real tokenizer: trained is the answer and its end, to the letter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxtune.config import DatasetConfig
from jaxtune.data.dataset import Batches, open_dataset
from jaxtune.data.preprocess import PreprocessConfig
from jaxtune.data.report.data_report import report
from jaxtune.data.schema import Message
from jaxtune.data.templating.template import needed_tokens, resolve
from jaxtune.data.tokenize import tokenize_prompt
from jaxtune.data.tokenizer import load_tokenizer

TEMPLATES = [
    "auto",
    "alpaca_original",
    "llama2",
    "USER: {instruction}\n{input}\nASSISTANT: {output}",
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_trained_tokens_decode_to_answer_and_end(shared_data: Path, name: str) -> None:
    from transformers import AutoTokenizer

    file, folder = shared_data / "alpaca_en_demo.json", shared_data / "tokenizers" / "mistral-v3"
    records = json.loads(file.read_text())
    tokenizer, reference = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    template = resolve(name, tokenizer)
    data = open_dataset([DatasetConfig(path=str(file))], PreprocessConfig(tokenizer, template))
    assert len(data) == len(records) == 999
    for i, record in enumerate(records):
        ids, weights = data.tokens(i)
        assert reference.decode(ids[weights > 0].tolist()) == record["output"] + "</s>"
        assert reference.decode(ids[weights == 0].tolist()).endswith(
            ("### Response:", "### Response:\n", "[/INST]", "ASSISTANT: ")
        )
        if i % 50 == 0:
            asked = Message("user", record["instruction"], record["input"])
            prompt = tokenize_prompt(template, tokenizer, [asked])
            assert ids[: len(prompt)].tolist() == prompt
            assert not weights[: len(prompt)].any()
            assert weights[len(prompt) :].all()
    found = report(data, Batches(data, batch_size=8, seed=0))
    assert found["dropped"] == 0
    assert found["answers_not_kept_exactly"] == 0
    assert found["packing"]["fill"] > 0.98


def test_rows_with_tools_are_counted_not_trained_without_them(shared_data: Path) -> None:
    file, folder = (
        shared_data / "glaive_toolcall_en_demo.json",
        shared_data / "tokenizers/mistral-v3",
    )
    tokenizer = load_tokenizer(str(folder))
    data = open_dataset(
        [DatasetConfig(path=str(file))], PreprocessConfig(tokenizer, resolve("llama2", tokenizer))
    )
    with_tools = sum(row["tools"] not in ("", "[]") for row in json.loads(file.read_text()))
    found = report(data)
    reasons = found["dropped_by_reason"]
    assert reasons["the template does not show the tools"]["count"] <= with_tools
    too_long = reasons.get("longer than max_length", {"count": 0})["count"]
    assert found["dropped"] - too_long == with_tools
    assert found["records"] == 300
    assert found["examples"] + found["dropped"] == 300


@pytest.mark.parametrize("name", ["mistral", "qwen"])
def test_tool_calls_of_a_real_file_are_trained(shared_data: Path, name: str) -> None:
    """300 conversations with declarations, calls and results; two are longer than max_length."""
    folder = shared_data / "tokenizers" / "mistral-v3"
    tokenizer = load_tokenizer(str(folder), add=needed_tokens(name))
    data = open_dataset(
        [DatasetConfig(path=str(shared_data / "glaive_toolcall_en_demo.json"))],
        PreprocessConfig(tokenizer, resolve(name, tokenizer)),
    )
    found = report(data)
    assert list(found["dropped_by_reason"]) == ["longer than max_length"]
    assert (found["examples"], found["dropped"]) == (298, 2)
    assert found["answers_not_kept_exactly"] == found["split_at_boundary"] == 0
