"""`prompt_loss_weight`: which tokens it weighs, as data, and that evaluations are without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.chat_templates import HEADERS, THINKING
from data.conversations import TWO, only, rows, text

from jaxtune.config import Config
from jaxtune.data.open import open_sides
from jaxtune.data.preprocess import PreprocessConfig, preprocess
from jaxtune.data.schema import Document, Dropped, Message
from jaxtune.data.templating.masking import render
from jaxtune.data.templating.template import resolve
from jaxtune.data.tokenizer import Tokenizer

SYSTEM = Message("system", "Be brief.")


def weight_of(row: Any) -> dict[str, float]:
    """Of each message and header: each text of a row stands once in it."""
    texts = ("Be brief.", "Name a prime.", "Seven.<|im_end|>", "Another?", "Eleven.<|im_end|>")
    found = {}
    for part in texts:
        (found[part.split("<")[0]],) = [span.weight for span in row if part in span.text]
    return found


@pytest.mark.parametrize(
    ("messages", "train_on", "expected"),
    [
        ([SYSTEM, *TWO], "assistant", [0.25, 0.25, 1, 0.25, 1]),
        ([SYSTEM, *TWO], "last", [0.25, 0.25, 0.25, 0.25, 1]),  # an earlier answer is prompt
        ([SYSTEM._replace(weight=0.0), *TWO], "assistant", [0, 0.25, 1, 0.25, 1]),
        ([SYSTEM, TWO[0]._replace(weight=0.5), *TWO[1:]], "last", [0.25, 0.125, 0.25, 0.25, 1]),
        ([SYSTEM, TWO[0], TWO[1]._replace(weight=0.0), *TWO[2:]], "last", [0.25, 0.25, 0, 0.25, 1]),
        ([SYSTEM, TWO[0], TWO[1]._replace(weight=0.5), *TWO[2:]], "assistant",
         [0.25, 0.25, 0.5, 0.25, 1]),
    ],
)  # fmt: skip
def test_each_message_weighs_its_own_share(
    byte_level: Tokenizer, messages: list[Message], train_on: str, expected: list[float]
) -> None:
    found = resolve(HEADERS, byte_level)
    row = only(found, messages, train_on=train_on, prompt_weight=0.25)
    assert list(weight_of(row).values()) == expected
    assert text(row) == text(only(found, [m._replace(weight=None) for m in messages]))
    headers = [span.weight for span in row if span.text.endswith("assistant\n")]
    assert headers == [0.25, 0.25]


@pytest.mark.parametrize("template", [HEADERS, "alpaca", "chatml"])
def test_one_is_train_on_all(byte_level: Tokenizer, template: str) -> None:
    found = resolve(template, byte_level)

    def by_letter(**options: Any) -> list[float]:
        row = only(found, TWO, **options)
        return [span.weight for span in row for _ in span.text]

    every = by_letter(train_on="all")
    assert set(every) == {1.0}
    assert by_letter(train_on="assistant", prompt_weight=1.0) == every
    assert by_letter(train_on="last", prompt_weight=1.0) == every


def test_where_history_is_rewritten_each_answer_has_its_own_prompt(byte_level: Tokenizer) -> None:
    found = resolve(THINKING, byte_level)
    first, second = rows(found, TWO, prompt_weight=0.5)
    for row, answer in ((first, "Seven."), (second, "Eleven.")):
        assert [answer in span.text for span in row if span.weight == 1] == [True]
        assert {span.weight for span in row} == {0.5, 1}
    (dropped,) = rows(found, [TWO[0], TWO[1]._replace(weight=0.5), *TWO[2:]], prompt_weight=0.5)
    assert isinstance(dropped, Dropped)
    assert "weight of its own" in dropped.reason
    assert "prompt_loss_weight" in dropped.detail


def test_a_document_has_no_prompt(byte_level: Tokenizer) -> None:
    found = resolve("alpaca", byte_level)
    assert render(found, Document("Words."), prompt_weight=0.5) == render(found, Document("Words."))


def test_tokens_begin_with_one_that_nothing_predicts(
    tmp_path: Path, byte_level_bos: Tokenizer
) -> None:
    """bos, or whatever comes first, is no target; blanks and ends of the template are prompt."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"instruction": "Name a prime.", "output": "Seven."}))
    config = Config(dataset=str(file))
    template = resolve("alpaca", byte_level_bos)
    settings = PreprocessConfig(byte_level_bos, template, prompt_loss_weight=0.1)
    (row,) = preprocess(config.datasets[0], settings)
    assert row.tokens is not None
    answer = len(byte_level_bos.encode("Seven.")) + 1
    prompt = len(row.tokens.ids) - answer
    np.testing.assert_array_equal(
        row.tokens.weights, np.float32([0.0] + [0.1] * (prompt - 1) + [1.0] * answer)
    )


@pytest.mark.parametrize("held_out", ["eval_split", "eval_datasets"])
def test_evaluations_are_of_answers(
    tmp_path: Path, byte_level: Tokenizer, held_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of the records that are not trained, though both sides are read with other weights."""
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path / "cache"))
    made = [{"instruction": f"Number {i}?", "output": f"It is {i}."} for i in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    beside = {"eval_split": 0.25} if held_out == "eval_split" else {"eval_datasets": str(file)}

    def sides(weight: float) -> Any:
        config = Config(dataset=str(file), prompt_loss_weight=weight, **beside)
        template = resolve("alpaca", byte_level)
        return open_sides(config, byte_level, template, progress=lambda path, records: None)

    (plain, plain_held), (weighted, held) = sides(0.0), sides(0.5)
    np.testing.assert_array_equal(held.gather("rows"), plain_held.gather("rows"))
    np.testing.assert_array_equal(weighted.gather("rows"), plain.gather("rows"))
    for i in range(len(held)):
        np.testing.assert_array_equal(held.tokens(i).weights, plain_held.tokens(i).weights)
    assert set(weighted.tokens(0).weights.tolist()) == {0.0, 0.5, 1.0}
    assert weighted.fingerprint != plain.fingerprint


def test_what_is_only_shown_is_not_refused_with_it(
    tmp_path: Path, byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`preview` opens both sides without the limit `max_dropped`; so are the answers of one."""
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path / "cache"))
    made = [{"instruction": f"Number {i}?", "output": "Yes." if i % 4 else ""} for i in range(16)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    config = Config(dataset=str(file), prompt_loss_weight=0.5, eval_split=0.25, max_dropped=0.1)
    template = resolve("alpaca", byte_level)
    train, held = open_sides(
        config, byte_level, template, progress=lambda path, records: None, refuse=False
    )
    assert held is not None
    assert [len(train), len(held)] == [9, 3]
