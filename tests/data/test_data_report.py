"""The report counts what is there: by brute force over small files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtune.config import DataError, DatasetConfig
from jaxtune.data.dataset import Batches, Dataset, open_dataset, split
from jaxtune.data.preprocess import PreprocessConfig
from jaxtune.data.report.data_report import (
    distribution,
    histograms,
    near_overlap,
    overlap,
    refuse,
    report,
)
from jaxtune.data.templating.template import resolve
from jaxtune.data.tokenizer import Tokenizer

STORY = ("once", "a", "fox", "met", "an", "old", "hound", "by", "the", "river", "at", "night")


def write(path: Path, rows: list[Any]) -> DatasetConfig:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return DatasetConfig(path=str(path))


def opened(entries: list[DatasetConfig], tokenizer: Tokenizer, **options: Any) -> Dataset:
    template = resolve("alpaca_original", tokenizer)
    return open_dataset(entries, PreprocessConfig(tokenizer, template, **options))


def story(number: int, words: int = 3, parts: str = "abcd") -> dict[str, str]:
    """Rows whose words are all their own."""
    own = [f"{word}{number}{part}" for part in parts for word in STORY]
    return {"instruction": " ".join(own), "output": f"answer{number} " * words}


def test_same_and_nearly_same_records(tmp_path: Path, byte_level: Tokenizer) -> None:
    rows = [story(i) for i in range(10)]
    twin = {**rows[3], "instruction": rows[3]["instruction"] + " indeed"}
    punctuated = {**rows[4], "instruction": rows[4]["instruction"] + "!"}
    data = opened([write(tmp_path / "a.jsonl", [*rows, rows[0], twin, punctuated])], byte_level)
    found = report(data)
    assert (found["duplicates"], found["near_duplicates"]) == (1, 2)
    other = opened([write(tmp_path / "b.jsonl", [story(99), rows[7], twin])], byte_level)
    assert overlap(data, other) == 2
    assert near_overlap(data, other) == 2
    fresh = opened([write(tmp_path / "c.jsonl", [story(5, 9), punctuated])], byte_level)
    assert (overlap(other, fresh), near_overlap(other, fresh)) == (0, 0)
    assert (overlap(data, fresh), near_overlap(data, fresh)) == (1, 2)


def test_a_system_prompt_does_not_make_records_alike(tmp_path: Path, byte_level: Tokenizer) -> None:
    rows = [{**story(i), "system": "You are kind. " * 50} for i in range(5)]
    assert report(opened([write(tmp_path / "a.jsonl", rows)], byte_level))["near_duplicates"] == 0


def test_answers_of_one_word(tmp_path: Path, byte_level: Tokenizer) -> None:
    answers = ["Yes.", " no\n", "two words", "a", "42", "well, yes"]
    rows = [{"instruction": f"q{i}", "output": answer} for i, answer in enumerate(answers)]
    assert report(opened([write(tmp_path / "a.jsonl", rows)], byte_level))["short_answers"] == 4


def test_counts_after_a_split_are_those_of_its_side(tmp_path: Path, byte_level: Tokenizer) -> None:
    """Every row has exactly one of the marks, so the sides must add up to the whole."""
    rows = [
        [story(i, parts="a"), {"instruction": f"{i} x</s>y", "output": "two words"},
         {"instruction": str(i), "output": "one"}, {"instruction": str(i), "output": ""},
         {"instruction": f"{i}?", "output": "long " * 200}][i % 5]
        for i in range(60)
    ]  # fmt: skip
    entry = write(tmp_path / "a.jsonl", rows)
    data = opened([entry], byte_level, max_length=150, truncation="truncate")
    train, held_out = split(data, 0.3, seed=3)
    for side in (data, train, held_out):
        found = report(side)
        kinds = Counter(side.gather("rows") % 5)
        assert found["examples"] == len(side) == sum(kinds.values())
        assert found["records"] == len(side) + 12  # the empty answers belong to no side
        assert found["dropped_by_reason"]["empty answer"]["count"] == 12
        assert found["typed_control_tokens"] == kinds[1]
        assert found["short_answers"] == kinds[2]
        assert found["truncated"] == found["answers_cut"] == kinds[4]
        assert found["stop_trained_share"] == 1 - kinds[4] / len(side)
        assert found["trained_tokens_cut"] == side.gather("lost").sum() > 0
        ids = [side.tokens(i) for i in range(len(side))]
        assert found["tokens_total"] == sum(len(tokens.ids) for tokens in ids)
        assert found["tokens_trained"] == sum(np.count_nonzero(tokens.weights) for tokens in ids)
    cut = report(train)["trained_tokens_cut"] + report(held_out)["trained_tokens_cut"]
    assert cut == report(data)["trained_tokens_cut"]
    json.dumps(report(train))


def test_tokens_lost_to_dropping(tmp_path: Path, byte_level: Tokenizer) -> None:
    long = {"instruction": "q", "output": "long " * 200}
    data = opened(
        [write(tmp_path / "a.jsonl", [story(1, parts="a"), long])], byte_level, max_length=150
    )
    whole = opened([write(tmp_path / "b.jsonl", [long])], byte_level)
    assert report(data)["trained_tokens_dropped"] == whole.trained_counts.sum()


def test_distribution_over_a_column(tmp_path: Path, byte_level: Tokenizer) -> None:
    kinds: list[Any] = ["shipping", "shipping", "returns", None, ["a"], "  ", "x" * 99]
    rows = [{**story(i), "category": kinds[i % 7]} for i in range(70)]
    del rows[0]["category"]
    rows.append({"instruction": "never trained", "output": "", "category": "shipping"})
    entries = [write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[1:3])]
    data = opened(entries, byte_level)
    found = distribution(data, entries, "category")
    assert {value: part["examples"] for value, part in found.items()} == {
        "shipping": 20, "returns": 11, "null": 10, '["a"]': 10, "(empty)": 10,
        "x" * 60 + "...": 10, "(absent)": 1,
    }  # fmt: skip
    assert next(iter(found)) == "shipping"
    train, held_out = split(data, 0.5, seed=0)
    halves = [distribution(side, entries, "category") for side in (train, held_out)]
    assert sum(half["shipping"]["examples"] for half in halves) == 20
    many = distribution(data, entries, "instruction")
    assert many["(50 others)"] == {"records": 50, "examples": 50}
    with pytest.raises(DataError, match=r"columns: no record that is trained has a column 'kind'"):
        distribution(data, entries, "kind")


def test_a_file_that_teaches_no_stop_is_refused(tmp_path: Path, byte_level: Tokenizer) -> None:
    long = {"instruction": "q", "output": "long " * 200}
    entry = write(tmp_path / "a.jsonl", [long, long])
    data = opened([entry], byte_level, max_length=150, truncation="truncate")
    with pytest.raises(DataError) as caught:
        refuse(data)
    assert str(caught.value) == (
        f"{entry.path}: all 2 rows lose the end of their answer to max_length (150), so no row "
        "teaches where to stop. Raise max_length, or set truncation to drop."
    )
    refuse(opened([write(tmp_path / "a.jsonl", [long, story(1)])], byte_level))


def test_an_earlier_answer_teaches_the_stop_too(tmp_path: Path, byte_level: Tokenizer) -> None:
    """The second answer is cut in every row; in two of three the first one is trained."""

    def row(number: int, **more: Any) -> dict[str, Any]:
        turns = [("user", f"q{number}"), ("assistant", "a"), ("user", "r"),
                 ("assistant", "long " * 200)]  # fmt: skip
        messages: list[dict[str, Any]] = [{"role": r, "content": c} for r, c in turns]
        messages[1] |= more
        return {"messages": messages}

    rows = [row(1), row(2, weight=0), row(3)]
    options: dict[str, Any] = {"max_length": 150, "truncation": "truncate"}
    data = opened([write(tmp_path / "a.jsonl", rows)], byte_level, **options)
    found = report(data)
    assert (found["answers_cut"], found["stop_trained_share"]) == (3, pytest.approx(2 / 3))
    refuse(data)
    with pytest.raises(DataError, match="all 1 rows lose the end"):
        refuse(opened([write(tmp_path / "b.jsonl", rows[1:2])], byte_level, **options))


def test_a_text_that_is_cut_teaches_no_stop(tmp_path: Path, byte_level: Tokenizer) -> None:
    """Its end is the tokenizer's, whatever the template's is."""
    entries = [write(tmp_path / "a.jsonl", [{"text": "short"}, {"text": "long " * 200}])]
    data = open_dataset(
        entries,
        PreprocessConfig(
            byte_level, resolve("chatml", byte_level), max_length=150, truncation="truncate"
        ),
    )
    assert report(data)["stop_trained_share"] == 0.5


def test_predicted_steps(tmp_path: Path, byte_level: Tokenizer) -> None:
    data = opened(
        [write(tmp_path / "a.jsonl", [story(i, parts="a") for i in range(10)])], byte_level
    )
    batches = Batches(data, batch_size=4, seed=0, packing=False)
    packing = report(data, batches, total_steps=batches.total_steps(2))["packing"]
    assert (packing["steps_per_epoch"], packing["total_steps"]) == (3, 6)
    assert packing["fill"] == pytest.approx((data.token_counts - 1).sum() / (10 * 128))


@pytest.mark.parametrize("bins", [1, 2, 7, 1000])
def test_histograms_count_every_example_once(
    tmp_path: Path, byte_level: Tokenizer, bins: int
) -> None:
    rows = [{"instruction": "q", "output": "word " * (i % 9 + i)} for i in range(1, 40)]
    data = opened([write(tmp_path / "a.jsonl", rows)], byte_level)
    found = histograms(data, bins)
    assert list(found) == ["Tokens of an example", "Trained tokens of an example"]
    for lengths, part in zip((data.token_counts, data.trained_counts), found.values(), strict=True):
        edges, counts = part["edges"], part["counts"]
        assert (edges[0], edges[-1]) == (lengths.min(), lengths.max() + 1)
        assert len(edges) == len(counts) + 1 <= bins + 1
        for low, high, count in zip(edges, edges[1:], counts, strict=False):
            assert count == sum(low <= length < high for length in lengths.tolist())
        assert sum(counts) == len(data)
