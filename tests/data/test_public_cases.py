"""Cases of other tools' public test suites, where jaxtune behaves alike or differs on purpose.

Inputs and expected outputs are theirs, restated in the nouns of this room; -100 there is weight 0
here, and rows here are shifted once, so n tokens have n - 1 targets. More of them stand in
`test_pack` (packing) and `test_encode` (boundaries); docs/data.md lists what is not shared and why.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.made import character_backend, save

from jaxtune.config import DatasetConfig
from jaxtune.data import preprocess
from jaxtune.data.dataset import open_dataset
from jaxtune.data.formats import FORMATS, to_noun
from jaxtune.data.packing import packed_batch
from jaxtune.data.preprocess import PreprocessConfig, PreprocessedRow
from jaxtune.data.report.data_report import report
from jaxtune.data.schema import Conversation, Dropped, Message, Span, WeightedTokens
from jaxtune.data.templating.masking import render
from jaxtune.data.templating.template import resolve
from jaxtune.data.tokenize import TokenizedRow, shift, tokenize_rows, truncate
from jaxtune.data.tokenizer import Tokenizer

PLAIN = "{instruction}{output}"


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A token for each letter, as in litgpt's MockTokenizer; `</s>` ends."""
    folder = tmp_path_factory.mktemp("letters")
    return save(folder, character_backend([]), bos_token="<s>", eos_token="</s>")


def tokens(ids: list[int], weights: list[float]) -> WeightedTokens:
    return WeightedTokens(np.array(ids, np.int32), np.array(weights, np.float32))


def prepared(
    tmp_path: Path, letters: Tokenizer, rows: list[Any], **options: Any
) -> list[PreprocessedRow]:
    """The rows of a file under the plainest of templates."""
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    settings = PreprocessConfig(letters, resolve(PLAIN, letters), **options)
    return list(preprocess.preprocess(DatasetConfig(path=str(file)), settings))


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


# -- rows of a batch -----------------------------------------------------------------------------


def test_collation_pads_right_with_weight_0() -> None:
    """trl TestDataCollatorForLanguageModeling: [1 2 3] and [4 5], padded to 3 and to 4."""
    examples = [shift(tokens([1, 2, 3], [1, 1, 1])), shift(tokens([4, 5], [1, 1]))]
    for length in (2, 3):  # 3 and 4 tokens, shifted
        batch = packed_batch([[0], [1]], lambda i: examples[i], length)
        more = [0] * (length - 2)
        assert batch.inputs.tolist() == [[1, 2, *more], [4, 0, *more]]
        assert batch.targets.tolist() == [[2, 3, *more], [5, 0, *more]]
        assert batch.weights.tolist() == [[1, 1, *more], [1, 0, *more]]
        assert (batch.segment_ids > 0).tolist() == (batch.weights > 0).tolist()


def test_the_pad_id_decides_nothing() -> None:
    """The same suite with pad id 999: a real token that equals the padding keeps its weight."""
    example = shift(tokens([7, 0, 0], [0, 1, 1]))  # 0 is what padding holds
    batch = packed_batch([[0]], lambda i: example, 4)
    assert batch.targets.tolist() == [[0, 0, 0, 0]]
    assert batch.weights.tolist() == [[1, 1, 0, 0]]


# -- length --------------------------------------------------------------------------------------


def test_rows_without_a_trained_token_after_truncation_are_dropped(
    tmp_path: Path, letters: Tokenizer
) -> None:
    """trl test_sft_trainer.py:1255: [1..5] with mask [0 0 0 1 1] goes, the row of three stays."""
    rows = prepared(
        tmp_path, letters, [pair("abc", "d"), pair("f", "g")], max_length=3, truncation="truncate"
    )
    assert rows[0].dropped is not None
    assert rows[0].dropped.reason == "nothing left to train within max_length"
    assert rows[1].dropped is None
    assert rows[1].tokens is not None
    assert rows[1].tokens.weights.tolist() == [0, 1, 1]


def test_what_is_too_long_with_only_its_prompt_left_is_dropped_not_trained_on_nothing(
    tmp_path: Path, letters: Tokenizer
) -> None:
    """litgpt test_base.py at max_seq_length 5: there every label is ignored and the row stays."""
    (row,) = prepared(
        tmp_path, letters, [pair("In: Foo Out:", "Bar")], max_length=5, truncation="truncate"
    )
    assert row.dropped is not None
    (row,) = prepared(tmp_path, letters, [pair("In: Foo Out:", "Bar")])
    assert row.tokens is not None
    assert row.tokens.weights.tolist() == [0] * 12 + [1] * 4
    assert letters.decode(row.tokens.ids.tolist()) == "In: Foo Out:Bar</s>"


def test_truncation_forces_no_end() -> None:
    """torchtune test_data_utils.py:17 ends the cut list with eos; that would teach a false stop."""
    cut = truncate(tokens([1, 2, 3, 99], [0, 1, 1, 1]), 3)
    assert cut.ids.tolist() == [1, 2, 3]
    assert cut.weights.tolist() == [0, 1, 1]


# -- what is trained -----------------------------------------------------------------------------

TURNS = (
    Message("system", "S."), Message("user", "1"), Message("assistant", "a"),
    Message("user", "2"), Message("assistant", "b"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("train_on", "trained"), [("assistant", ["a</s>", "b</s>"]), ("last", ["b</s>"])]
)
def test_masking_strategies(letters: Tokenizer, train_on: Any, trained: list[str]) -> None:
    """torchtune test_messages.py:1103, five messages: [T T F T F] and [T T T T F] are masked."""
    template = resolve("alpaca", letters)
    (row,) = render(template, Conversation(TURNS), train_on=train_on)
    assert not isinstance(row, Dropped)
    assert [span.text.strip() for span in row if span.weight] == trained


def test_all_trains_the_system_message_too(letters: Tokenizer) -> None:
    """The same table masks it under `train_on_all`; here all is all, as in a text document."""
    (row,) = render(resolve("alpaca", letters), Conversation(TURNS), train_on="all")
    assert not isinstance(row, Dropped)
    (encoded,) = tokenize_rows([row], letters)
    assert isinstance(encoded, TokenizedRow)
    assert encoded.tokens.weights.tolist() == [0.0] + [1.0] * (len(encoded.tokens.ids) - 1)


def test_weights_of_spans_sum_to_the_number_of_groups(letters: Tokenizer) -> None:
    """axolotl test_weighted_loss.py: two groups of weight 1/2 and 1/3; uniform guesses, 2 ln V."""
    row = (
        Span("x", 0.0), Span("a</s>", 1 / 2, answer=True), Span("yz", 0.0),
        Span("bc</s>", 1 / 3, answer=True),
    )  # fmt: skip
    (found,) = tokenize_rows([row], letters)
    assert isinstance(found, TokenizedRow)
    expected = [0, 1 / 2, 1 / 2, 0, 0, 1 / 3, 1 / 3, 1 / 3]
    np.testing.assert_allclose(found.tokens.weights, expected, rtol=1e-6)
    uniform = shift(found.tokens).weights.sum() * math.log(50)
    assert uniform == pytest.approx(2 * math.log(50), rel=1e-6)


def test_text_is_trained_whole_and_ended(tmp_path: Path, letters: Tokenizer) -> None:
    """torchtune test_text_completion_dataset.py with eos; the one without it is not offered."""
    (row,) = prepared(tmp_path, letters, [{"text": "This is a text."}])
    assert row.tokens is not None
    assert letters.decode(row.tokens.ids.tolist()) == "This is a text.</s>"
    assert row.tokens.weights.tolist() == [0] + [1] * 15


# -- formats -------------------------------------------------------------------------------------


def test_alpaca_data_under_a_chat_template(letters: Tokenizer) -> None:
    """LLaMA-Factory test_converter.py: instruction and input become one user turn."""
    record = {"instruction": "Solve the math problem.", "input": "3 + 4", "output": "7"}
    noun = to_noun("alpaca", record, {}, "f:1")
    chat = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    assert isinstance(noun, Conversation)
    (row,) = render(resolve(chat, letters), noun)
    assert not isinstance(row, Dropped)
    assert "".join(s.text for s in row) == "Solve the math problem.\n3 + 4</s>7</s>"


def test_sharegpt_roles_and_system() -> None:
    """LLaMA-Factory test_converter.py and trl TestMaybeConvertToChatML."""
    record = {
        "conversations": [
            {"from": "system", "value": "You are a helpful assistant."},
            {"from": "human", "value": "Solve the math problem.\n3 + 4"},
            {"from": "gpt", "value": "The answer is 7."},
        ]
    }
    noun = to_noun("sharegpt", record, {}, "f:1")
    assert isinstance(noun, Conversation)
    assert [(m.role, m.content) for m in noun.messages] == [
        ("system", "You are a helpful assistant."),
        ("user", "Solve the math problem.\n3 + 4"),
        ("assistant", "The answer is 7."),
    ]


def test_duplicates_are_counted_and_kept(tmp_path: Path, letters: Tokenizer) -> None:
    """axolotl test_exact_deduplication.py removes them; here the report says how many there are."""
    rows = [pair("a", "1"), pair("b", "2"), pair("a", "1"), pair("a", "3"), pair("a", "1")]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    data = open_dataset(
        [DatasetConfig(path=str(file))], PreprocessConfig(letters, resolve(PLAIN, letters))
    )
    found = report(data)
    assert (found["examples"], found["duplicates"]) == (5, 2)


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHARED = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
BY_FORMAT: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "q", "output": "a"},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "messages": {"messages": CHAT},
    "sharegpt": {"conversations": SHARED},
    "text": {"text": "a"},
}


@pytest.mark.parametrize("name", BY_FORMAT)
def test_every_format_ends_with_a_stop_whatever_its_columns_are_called(
    tmp_path: Path, letters: Tokenizer, name: str
) -> None:
    """trl adds eos where a column is called `text` and reads the one that is configured."""
    assert set(BY_FORMAT) == set(FORMATS) - {"tokens"}  # which bring their own end, or none
    template = resolve(PLAIN, letters)
    for columns in ({}, {column: f"my {column}" for column in BY_FORMAT[name]}):
        row = {columns.get(column, column): value for column, value in BY_FORMAT[name].items()}
        file = tmp_path / f"{len(columns)}.jsonl"
        file.write_text(json.dumps(row))
        entry = DatasetConfig(path=str(file), format=name, columns=columns)
        (found,) = preprocess.preprocess(entry, PreprocessConfig(letters, template))
        assert found.tokens is not None, found.dropped
        assert found.tokens.ids[-1] == letters.eos_id
        assert found.tokens.weights[-1] == 1
        assert found.tokens.ids.tolist().count(letters.eos_id) == 1
