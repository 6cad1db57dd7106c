"""From files to the batch of a step: counted, cached, in an order seed and step decide."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.chat_templates import HEADERS, SYSTEM_IGNORING, THINKING

from jaxtune.config import ConfigError, DataError, DatasetConfig
from jaxtune.data import cache, preprocess
from jaxtune.data import dataset as pipeline
from jaxtune.data.dataset import Batches, Dataset, eval_batches, open_dataset, prefetch, split
from jaxtune.data.preprocess import PreprocessConfig, dataset_names
from jaxtune.data.report.data_report import overlap, report
from jaxtune.data.schema import Message
from jaxtune.data.templating.template import resolve
from jaxtune.data.tokenize import tokenize_prompt
from jaxtune.data.tokenizer import Tokenizer

ROWS = [{"instruction": f"Say {i}.", "output": "word " * (1 + i % 7) + str(i)} for i in range(40)]


def write(path: Path, rows: list[Any]) -> DatasetConfig:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return DatasetConfig(path=str(path))


def opened(
    entries: list[DatasetConfig],
    tokenizer: Tokenizer,
    cache_dir: Path | None = None,
    template: str = "alpaca_original",
    **options: Any,
) -> Dataset:
    config = PreprocessConfig(tokenizer, resolve(template, tokenizer), **options)
    return open_dataset(entries, config, cache_dir=cache_dir)


@pytest.fixture
def dataset(tmp_path: Path, byte_level: Tokenizer) -> Dataset:
    return opened([write(tmp_path / "rows.jsonl", ROWS)], byte_level, max_length=256)


def ids(dataset: Dataset) -> list[list[int]]:
    return [dataset.tokens(i).ids.tolist() for i in range(len(dataset))]


def content(batch: Any) -> set[tuple[int, ...]]:
    """The segments of a batch, by their inputs."""
    found = set()
    for inputs, segments in zip(batch.inputs, batch.segment_ids, strict=True):
        for segment in range(1, segments.max() + 1):
            found.add(tuple(inputs[segments == segment].tolist()))
    return found


# -- opening and counting ------------------------------------------------------------------------


def test_examples_lie_as_in_the_file(dataset: Dataset, byte_level: Tokenizer) -> None:
    for i, row in enumerate(ROWS):
        tokens = dataset.tokens(i)
        assert byte_level.decode(tokens.ids[tokens.weights > 0].tolist()) == row["output"] + "</s>"
    assert dataset.token_counts.tolist() == [len(x) for x in ids(dataset)]
    counts = [np.count_nonzero(dataset.tokens(i).weights) for i in range(len(dataset))]
    assert dataset.trained_counts.tolist() == counts
    assert dataset.gather("rows").tolist() == list(range(40))


DEFECTS: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, None),
    ({"messages": [{"role": "user", "content": "q"}]}, "no answer to train"),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]},
     "empty answer"),
    ({"messages": "hello"}, "messages is not a list of messages"),
    ({"messages": [{"role": "user", "content": 1}]}, "content is not text"),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a " * 500}]},
     "longer than max_length"),
    ({"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "a"}]},
     "the text is not valid Unicode"),
    ({"messages": [{"role": "user", "content": "q"},
                   {"role": "assistant", "content": "a<|im_end|>"}]},
     None),  # typed, so it is text; `typed_control_tokens` counts it
]  # fmt: skip


def test_one_of_each_defect_is_counted_by_reason(tmp_path: Path, byte_level: Tokenizer) -> None:
    entry = write(tmp_path / "bad.jsonl", [row for row, _ in DEFECTS])
    found = report(opened([entry], byte_level, template=HEADERS, max_length=64))
    assert (found["records"], found["examples"], found["dropped"]) == (8, 2, 6)
    assert found["typed_control_tokens"] == 1
    expected = {why: (1, line) for line, (_, why) in enumerate(DEFECTS, 1) if why}
    assert {
        why: (entry["count"], int(entry["first"][0]["where"].rsplit(":", 1)[1]))
        for why, entry in found["dropped_by_reason"].items()
    } == expected


@pytest.mark.parametrize("extra", [
    {"reasoning_content": "a\ud800b"},
    {"tool_calls": [{"function": {"name": "clock", "arguments": '{"zone": "\ud800"}'}}]},
])  # fmt: skip
def test_half_a_surrogate_pair_anywhere_drops_the_row(
    tmp_path: Path, byte_level: Tokenizer, extra: dict[str, Any]
) -> None:
    asked = {"role": "user", "content": "q"}
    bad = {"messages": [asked, {"role": "assistant", "content": "a", **extra}]}
    good = {"messages": [asked, {"role": "assistant", "content": "a"}]}
    entry = write(tmp_path / "bad.jsonl", [bad, good])
    found = report(opened([entry], byte_level, template=HEADERS, max_length=64))
    assert found["examples"] == 1
    assert found["dropped_by_reason"].keys() == {"the text is not valid Unicode"}


def test_a_mapped_column_that_no_record_has_is_named(tmp_path: Path, byte_level: Tokenizer) -> None:
    rows = [{"q": "Do.", "a": "Done."}, {"q": "Do.", "ctx": "x", "a": "Done."}]
    entry = write(tmp_path / "own.jsonl", rows)
    mapped = {"instruction": "q", "input": "ctx", "output": "a"}
    own = entry.model_copy(update={"format": "alpaca", "columns": mapped})
    assert len(opened([own], byte_level)) == 2
    wrong = own.model_copy(update={"columns": {**mapped, "input": "cntxt"}})
    with pytest.raises(DataError, match="columns: input is cntxt, which no record has"):
        opened([wrong], byte_level)
    assert (
        len(opened([wrong.model_copy(update={"limit": 1})], byte_level)) == 1
    )  # there may be later


@pytest.mark.parametrize(
    ("row", "columns", "note"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"completion": "chosen"},
         "rejected is not used: rows are trained as format 'prompt_completion' alone; chosen is "
         "read as completion"),
        ({"prompt": "q", "completion": "a", "label": False}, {},
         "label is not used: rows are trained as format 'prompt_completion' alone; answers with "
         "label false are trained too"),
        ({"prompt": "q", "completion": "a", "label": 1, "chosen": None}, {}, None),  # a class
        ({"instruction": "q", "output": "a", "chosen": "a", "rejected": "b", "input_ids": [1]}, {},
         "chosen, input_ids, rejected are not used: rows are trained as format 'alpaca' alone"),
        ({"input_ids": [5, 6], "labels": [5, 6]}, {}, None),
    ],
)  # fmt: skip
def test_columns_that_others_train_on_are_said_to_be_unused(
    tmp_path: Path,
    byte_level: Tokenizer,
    row: dict[str, Any],
    columns: dict[str, str],
    note: str | None,
) -> None:
    entry = write(tmp_path / "rows.jsonl", [{**row, "rejected": None}, row])
    entry = entry.model_copy(update={"columns": columns})
    notes = [text for text in opened([entry], byte_level).notes if "used" in text]
    assert notes == ([] if note is None else [f"{entry.path}: {note}"])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (("d1/ev.jsonl", "d2/ev.jsonl", "x/b.json"), ["d1/ev", "d2/ev", "b"]),
        (("a/s/ev.jsonl", "b/s/ev.jsonl"), ["a/s/ev", "b/s/ev"]),
        (("ev.jsonl", "d/ev.jsonl"), ["ev.jsonl", "d/ev"]),
        (("ev.jsonl", "ev.jsonl"), ["ev", "ev"]),
        (("d/ev.jsonl", "d/ev.json"), ["d/ev.jsonl", "d/ev.json"]),
        (("d/*.json",), ["d/*.json"]),
    ],
)
def test_files_of_one_name_are_told_apart(paths: tuple[str, ...], names: list[str]) -> None:
    assert dataset_names([DatasetConfig(path=path) for path in paths]) == names
    named = [DatasetConfig(path=path, name="mine") for path in paths]
    assert dataset_names(named) == ["mine"] * len(paths)


def test_rows_of_an_expanded_record_count_as_one_record(
    tmp_path: Path, byte_level: Tokenizer
) -> None:
    chat = [{"role": r, "content": f"{r} {i}"} for i in range(3) for r in ("user", "assistant")]
    data = opened([write(tmp_path / "a.jsonl", [{"messages": chat}] * 5)], byte_level,
                  template=THINKING)  # fmt: skip
    found = report(data)
    assert (found["records"], found["examples"], found["duplicates"]) == (5, 15, 12)
    train, held_out = split(data, 0.2, seed=0)
    assert (len(train), len(held_out)) == (12, 3)
    assert not set(train.gather("rows")) & set(held_out.gather("rows"))
    assert overlap(train, held_out) == 3  # all five records are alike


def test_report_of_lengths_and_flags(tmp_path: Path, byte_level: Tokenizer) -> None:
    rows = [*ROWS[:9], ROWS[0], {"instruction": "x</s>y", "output": "a " * 300}]
    entry = write(tmp_path / "a.jsonl", rows)
    data = opened([entry], byte_level, max_length=200, truncation="truncate")
    found = report(data, Batches(data, batch_size=2, seed=0))
    lengths = np.sort(data.token_counts)
    assert found["lengths"] == {"p50": lengths[5], "p90": lengths[9], "p99": 200, "max": 200}
    assert found["duplicates"] == 1
    assert (found["truncated"], found["answers_cut"], found["typed_control_tokens"]) == (1, 1, 1)
    assert found["stop_trained_share"] == 10 / 11
    assert found["trained_tokens_cut"] > 0
    assert found["tokens_trained"] == data.trained_counts.sum()
    assert found["notes"] == [f"{entry.path}: read as format 'alpaca'"]
    assert found["packing"]["rows"] == Batches(data, batch_size=2, seed=0).rows
    json.dumps(found)


# -- length --------------------------------------------------------------------------------------


def test_dropped_rows_are_named_where_the_data_lies_now(
    tmp_path: Path, byte_level: Tokenizer
) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    first.mkdir()
    write(first / "a.jsonl", ROWS[:3])
    write(first / "b.jsonl", [ROWS[3], {**ROWS[4], "output": ""}])
    for folder in (first, second):
        data = opened([DatasetConfig(path=str(folder))], byte_level)  # the second from the cache
        found = report(data)
        assert (
            found["dropped_by_reason"]["empty answer"]["first"][0]["where"] == f"{folder}/b.jsonl:2"
        )
        assert f"{folder}: 2 files: {folder}/a.jsonl, {folder}/b.jsonl" in data.notes
        if folder == first:
            first.rename(second)


def test_truncation_policies(tmp_path: Path, byte_level: Tokenizer) -> None:
    entry = write(tmp_path / "a.jsonl", [ROWS[0], {**ROWS[1], "output": "long " * 100}])
    short = len(opened([entry], byte_level, max_length=4096).tokens(0).ids)
    assert len(opened([entry], byte_level, max_length=short)) == 1  # exactly full stays
    with pytest.raises(DataError, match="nothing to train: all 2 rows are dropped"):
        opened([entry], byte_level, max_length=short - 1)
    cut = opened([entry], byte_level, max_length=short + 5, truncation="truncate")
    last = cut.tokens(1)
    assert len(last.ids) == short + 5
    assert byte_level.eos_id not in last.ids  # no end is forced where the text went on
    with pytest.raises(DataError, match=rf"a.jsonl:2: \d+ tokens, max_length {short}. Raise max_l"):
        opened([entry], byte_level, max_length=short, truncation="error")


def test_rows_with_nothing_left_are_dropped(tmp_path: Path, byte_level: Tokenizer) -> None:
    entry = write(tmp_path / "a.jsonl", [{"instruction": "q " * 30, "output": "a"}])
    with pytest.raises(DataError) as caught:
        opened([entry], byte_level, max_length=8, truncation="truncate")
    assert "1 because: nothing left to train within max_length" in str(caught.value)
    assert re.search(r"Tried on 1 of them: max_length \d+ keeps 1", str(caught.value))


def test_all_rows_dropped_names_the_commonest_reason(tmp_path: Path, byte_level: Tokenizer) -> None:
    chat = [{"role": r, "content": r} for r in ("system", "user", "assistant")]
    entry = write(tmp_path / "a.jsonl", [{"messages": chat}, {"messages": chat}, {"messages": 0}])
    with pytest.raises(DataError) as caught:
        opened([entry], byte_level, template=SYSTEM_IGNORING)
    assert str(caught.value).startswith(
        f"{entry.path}:1: nothing to train: all 3 rows are dropped, 2 because: the template does "
        "not show the system message: message 1; 1 because: messages is not a list of messages."
    )


# -- the cache -----------------------------------------------------------------------------------


def key(tokenizer: Tokenizer, entry: DatasetConfig, **options: Any) -> str:
    template = resolve(options.pop("template", "alpaca"), tokenizer, stop=options.pop("stop", None))
    return preprocess.cache_key(entry, pipeline.PreprocessConfig(tokenizer, template, **options))


def test_cache_key_follows_everything_that_makes_tokens(
    tmp_path: Path, byte_level: Tokenizer, byte_level_bos: Tokenizer, monkeypatch: Any
) -> None:
    entry = write(tmp_path / "a.jsonl", ROWS)
    base = key(byte_level, entry)
    changed = [
        key(byte_level, write(tmp_path / "b.jsonl", ROWS[:-1])),
        key(byte_level_bos, entry),
        key(byte_level, entry, template="alpaca_original"),
        key(byte_level, entry, stop="<|im_end|>"),
        key(byte_level, entry, train_on="last"),
        key(byte_level, entry, prompt_loss_weight=0.5),
        key(byte_level, entry, max_length=7),
        key(byte_level, entry, truncation="truncate"),
        key(byte_level, DatasetConfig(path=entry.path, format="alpaca")),
        key(byte_level, DatasetConfig(path=entry.path, columns={"output": "instruction"})),
        key(byte_level, DatasetConfig(path=entry.path, limit=3)),
    ]
    monkeypatch.setattr(preprocess, "code_version", lambda: "other code")
    changed.append(key(byte_level, entry))
    assert len({base, *changed}) == len(changed) + 1
    monkeypatch.undo()
    moved = write(tmp_path / "moved.jsonl", ROWS)
    assert key(byte_level, DatasetConfig(path=moved.path, name="other")) == base


def test_second_opening_reads_the_cache(
    tmp_path: Path, byte_level: Tokenizer, monkeypatch: Any
) -> None:
    entry = write(tmp_path / "a.jsonl", ROWS)
    first = opened([entry], byte_level, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(preprocess, "tokenize_chunk", None)  # tokenising again would fail
    again = opened([entry], byte_level, cache_dir=tmp_path / "cache")
    assert ids(again) == ids(first)
    assert again.fingerprint == first.fingerprint
    assert isinstance(again.sources[0].stored.arrays["ids"], np.memmap)
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.name.startswith(".")] == []


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    def build(writer: cache.Writer) -> dict[str, Any]:
        writer.append("ids", np.arange(3))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.stored(tmp_path, "key", build)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_only_a_note(
    tmp_path: Path, byte_level: Tokenizer
) -> None:
    (tmp_path / "file").write_text("")
    entry = write(tmp_path / "a.jsonl", ROWS)
    data = opened([entry], byte_level, cache_dir=tmp_path / "file" / "cache")
    assert len(data) == 40
    assert any("cannot be written" in note for note in data.notes)


def test_fingerprint_follows_the_data(tmp_path: Path, byte_level: Tokenizer) -> None:
    def print_of(rows: list[Any], **options: Any) -> str:
        return opened([write(tmp_path / "a.jsonl", rows)], byte_level, **options).fingerprint

    base = print_of(ROWS)
    changed = [{**ROWS[0], "output": "other"}, *ROWS[1:]]
    assert print_of(ROWS) == base
    other_rows = [print_of(rows) for rows in (changed, ROWS[::-1], ROWS[1:])]
    other_options = [print_of(ROWS, template="alpaca"), print_of(ROWS, train_on="all")]
    assert len({base, *other_rows, *other_options}) == 6


# -- order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
def test_every_example_once_an_epoch(dataset: Dataset, packing: bool) -> None:
    batches = Batches(dataset, batch_size=3, seed=5, packing=packing)
    steps = batches.total_steps(2)
    assert steps == 2 * batches.steps_per_epoch
    numbers = [[n for row in batches.examples(s) for n in row] for s in range(steps)]
    per_epoch = batches.steps_per_epoch
    for epoch in (numbers[:per_epoch], numbers[per_epoch:]):
        assert sorted(n for step in epoch for n in step) == list(range(40))
    assert numbers[:per_epoch] != numbers[per_epoch:]
    found = [batches.batch(step) for step in range(per_epoch)]
    assert {batch.inputs.shape for batch in found} == {(3, batches.row_length)}
    assert set().union(*(content(b) for b in found)) == {tuple(x[:-1]) for x in ids(dataset)}
    assert sum(b.weights.sum() for b in found) == dataset.trained_counts.sum()


def test_unpacked_rows_are_as_long_as_needed(dataset: Dataset) -> None:
    assert Batches(dataset, batch_size=4, seed=0).row_length == 256
    assert Batches(dataset, batch_size=4, seed=0, packing=False).row_length == 128
    assert Batches(dataset, batch_size=4, seed=0, packing=False).rows == 40


def test_a_step_is_a_pure_function_of_seed_and_step(dataset: Dataset) -> None:
    """Resume: mid-epoch, at the boundary and behind it, with other host counts (P30)."""
    straight = Batches(dataset, batch_size=4, seed=3)
    boundary = straight.steps_per_epoch
    for start in (0, 1, boundary - 1, boundary, boundary + 1, 3 * boundary + 1):
        resumed = Batches(dataset, batch_size=4, seed=3)
        for step in (start, start + 1):
            whole = straight.batch(step)
            for hosts in (1, 2, 4):
                parts = [
                    resumed.batch_rows(step, h * 4 // hosts, (h + 1) * 4 // hosts)
                    for h in range(hosts)
                ]
                for name in whole._fields:
                    joined = np.concatenate([getattr(part, name) for part in parts])
                    np.testing.assert_array_equal(joined, getattr(whole, name))
    other = Batches(dataset, batch_size=4, seed=4)
    assert other.examples(0) != straight.examples(0)


def test_step_arithmetic(tmp_path: Path, byte_level: Tokenizer) -> None:
    data = opened([write(tmp_path / "a.jsonl", ROWS[:10])], byte_level)
    batches = Batches(data, batch_size=4, seed=0, packing=False)
    assert batches.steps_per_epoch == 3  # 4 + 4 + 2: the tail is not lost (P33)
    assert [batches.total_steps(e) for e in (1, 2, 0.5, 0.01, 2.5)] == [3, 6, 2, 1, 8]
    assert batches.total_steps(2, max_steps=100) == 100
    assert [batches.locate(s) for s in (0, 2, 3, 7)] == [(0, 0), (0, 2), (1, 0), (2, 1)]
    last = batches.batch(2)
    assert (last.segment_ids.max(axis=1) > 0).tolist() == [True, True, False, False]
    assert not last.weights[2:].any()


def test_several_sources_one_after_the_other(tmp_path: Path, byte_level: Tokenizer) -> None:
    first = write(tmp_path / "first.jsonl", ROWS[:3])
    second = write(tmp_path / "second.jsonl", [{"text": "plain text"}] * 4)
    limited = DatasetConfig(path=second.path, limit=2, name="texts")
    data = opened([first, limited], byte_level)
    assert (len(data), data.names) == (5, ("first", "texts"))
    assert len(data.only("texts")) == 2
    assert byte_level.decode(data.only("texts").tokens(0).ids.tolist()) == "plain text</s>"
    parts = report(data)["by_dataset"]
    assert [(p["format"], p["examples"]) for p in parts.values()] == [("alpaca", 3), ("text", 2)]
    with pytest.raises(ConfigError, match="dataset: none given"):
        opened([], byte_level)


def test_held_out_examples_are_not_trained(dataset: Dataset) -> None:
    train, held_out = split(dataset, 0.25, seed=1)
    assert (len(train), len(held_out)) == (30, 10)
    assert sorted([*train.chosen, *held_out.chosen]) == list(range(40))
    again = split(dataset, 0.25, seed=1)[1]
    assert again.chosen.tolist() == held_out.chosen.tolist()
    assert split(dataset, 0.25, seed=2)[1].chosen.tolist() != held_out.chosen.tolist()
    assert ids(held_out) == [ids(dataset)[i] for i in held_out.chosen]
    assert train.fingerprint != dataset.fingerprint
    assert len(split(dataset, 0.001, seed=1)[1]) == 1
    one = split(dataset, 0.001, seed=1)[1]
    with pytest.raises(DataError, match=r"eval_split 0\.9: 1 rows are too few"):
        split(one, 0.9, seed=0)


def test_evaluation_sees_the_same_whatever_the_batch(dataset: Dataset) -> None:
    sums = set()
    for rows in (1, 3, 8):
        for packing in (True, False):
            made = list(eval_batches(dataset, rows, packing=packing))
            found = [batch.rows(0, rows) for batch in made]
            # What is counted without making a batch is what the batch holds.
            assert [int(np.count_nonzero(b.weights)) for b in found] == [b.trained for b in made]
            assert len({batch.inputs.shape for batch in found}) == 1
            assert found[0].inputs.shape[0] == rows
            trained = sum(int(batch.weights.sum()) for batch in found)
            mixed = sum(int((batch.weights * batch.targets * 7 + batch.inputs).sum())
                        for batch in found)  # fmt: skip
            sums.add((trained, mixed, frozenset().union(*(content(b) for b in found))))
    assert len(sums) == 1
    first = next(eval_batches(dataset, 2)).rows(0, 2)
    assert first.inputs[0][: len(ids(dataset)[0]) - 1].tolist() == ids(dataset)[0][:-1]


def test_prompt_of_chat_is_a_prefix_of_the_stored_row(
    dataset: Dataset, byte_level: Tokenizer
) -> None:
    template = resolve("alpaca_original", byte_level)
    for i, row in enumerate(ROWS[:5]):
        prompt = tokenize_prompt(template, byte_level, [Message("user", row["instruction"])])
        assert dataset.tokens(i).ids[: len(prompt)].tolist() == prompt


# -- ahead of time -------------------------------------------------------------------------------


def test_prefetch_keeps_order_and_raises_here() -> None:
    assert list(prefetch(lambda step: step * step, 3, 7)) == [9, 16, 25, 36]

    def fails(step: int) -> int:
        if step == 2:
            raise DataError("row 2")
        return step

    found: Iterator[int] = prefetch(fails, 0, 5)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(DataError, match="row 2"):
        next(found)


def test_prefetch_stops_with_its_reader() -> None:
    made = []

    def make(step: int) -> int:
        made.append(step)
        return step

    found = prefetch(make, 0, 10_000, depth=2)
    assert next(found) == 0
    found.close()
    count = len(made)
    time.sleep(0.05)
    assert len(made) == count < 10
    assert not [t for t in threading.enumerate() if t.name == "jaxtune-batches"]
