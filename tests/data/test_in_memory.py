"""Rows in memory: every kind becomes the same dataset file, and mistakes name their row."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtune.config import DataError
from jaxtune.data import readers
from jaxtune.data.in_memory import dataset_file

ROWS = [
    {"prompt": "Name a prime.", "completion": "Seven."},
    {"prompt": "é\u2028", "completion": "y"},
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path))
    return tmp_path


def rows_of(data: Any) -> list[dict[str, Any]]:
    path = dataset_file(data)
    return [record.fields for record in readers.read(readers.File(Path(path), path))]


def test_every_kind_becomes_the_same_file() -> None:
    datasets = pytest.importorskip("datasets")
    pandas = pytest.importorskip("pandas")
    polars = pytest.importorskip("polars")
    kinds = [
        ROWS,
        tuple(ROWS),
        (row for row in ROWS),
        datasets.Dataset.from_list(ROWS),
        pandas.DataFrame(ROWS),
        polars.DataFrame(ROWS),
    ]
    assert len({dataset_file(kind) for kind in kinds}) == 1
    assert rows_of(ROWS) == ROWS


def test_other_rows_and_another_order_are_another_file() -> None:
    assert len({dataset_file(ROWS), dataset_file(ROWS[::-1]), dataset_file(ROWS[:1])}) == 3


def test_a_path_stays_as_it_is() -> None:
    assert dataset_file("gs://bucket/rows.jsonl") == "gs://bucket/rows.jsonl"
    assert dataset_file(Path("a/b.jsonl")) == "a/b.jsonl"


def test_missing_values_of_data_frames_are_null() -> None:
    pandas = pytest.importorskip("pandas")
    polars = pytest.importorskip("polars")
    rows = [{"prompt": "a", "input": None, "n": 1}, {"prompt": "b", "input": "c", "n": None}]
    frame = pandas.DataFrame(rows)
    frame["n"] = frame["n"].astype("Int64")
    frame["when"] = pandas.NaT
    assert rows_of(frame) == [{**row, "when": None} for row in rows]
    assert rows_of(pandas.DataFrame({"x": [1.5, np.nan]})) == [{"x": 1.5}, {"x": None}]
    assert rows_of(polars.DataFrame(rows)) == rows


def test_what_a_table_fills_up_with_nulls_is_not_in_a_call() -> None:
    """Each row has its own keys; a table gives every row those of all."""
    datasets = pytest.importorskip("datasets")
    polars = pytest.importorskip("polars")
    rows = [
        {"messages": [{"role": "assistant", "tool_calls": [{"name": name, "arguments": own}]}]}
        for name, own in (("add", {"a": 2, "b": {"c": 1}}), ("clock", {"zone": "UTC"}))
    ]
    assert rows_of(rows) == rows
    assert rows_of(datasets.Dataset.from_list(rows)) == rows
    assert rows_of(polars.DataFrame(rows)) == rows
    with_null = [{"messages": [{"role": "user", "x": {"y": None}}], "z": None}]
    assert rows_of(with_null) == with_null  # JSON means it


def test_nested_messages_and_numpy_values() -> None:
    pandas = pytest.importorskip("pandas")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    array = np.array(messages, object)  # as pandas reads a list from parquet
    assert rows_of(pandas.DataFrame({"messages": [array]})) == [{"messages": messages}]
    row = {"a": np.int64(3), "b": np.float32(0.5), "c": np.bool_(True), "d": np.arange(2)}
    assert rows_of([row]) == [{"a": 3, "b": 0.5, "c": True, "d": [0, 1]}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([*ROWS, "text"], r"data\[2\]: expected a dict, came str\."),
        ([*ROWS, {"a": 1, "b": {1, 2}}], r"data\[2\]\['b'\]: JSON cannot hold .* type set\."),
        ([{"a": datetime.date(2024, 1, 1)}], r"data\[0\]\['a'\]: .* type date\. Remove the column"),
        ([{"a": float("nan")}], r"data\[0\]\['a'\]: .* nan is no number in JSON"),
        ([{"a": [float("inf")]}], r"data\[0\]\['a'\]: .* not JSON compliant"),
        ([{1: "a"}], r"data\[0\]: expected text as the name of a column, came 1"),
        ([], r"data: holds no rows"),
        ({"prompt": ["a"]}, r"data: expected a list of dicts, .* came dict\."),
        (17, r"data: expected a list of dicts, .* came int\."),
    ],
)
def test_a_mistake_names_its_row_and_column(data: Any, message: str, cache: Path) -> None:
    with pytest.raises(DataError, match=message):
        dataset_file(data)
    assert not list(cache.rglob("*.jsonl"))


def test_mistakes_of_the_libraries() -> None:
    datasets = pytest.importorskip("datasets")
    pandas = pytest.importorskip("pandas")
    polars = pytest.importorskip("polars")
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))
    with pytest.raises(DataError, match="eval_data: has several splits: train"):
        dataset_file(splits, name="eval_data")
    with pytest.raises(DataError, match="two columns are called 'a'"):
        dataset_file(pandas.DataFrame([[1, 2]], columns=["a", "a"]))
    with pytest.raises(DataError, match=r"Give data\.collect\(\)"):
        dataset_file(polars.LazyFrame(ROWS))


def test_files_used_longest_ago_are_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from jaxtune.data.in_memory import dataset_file\n"
        "for n in range(3): print(dataset_file([{'text': str(n) * 40}]))"
    )  # in a process that ends: what a living one reads is not evicted
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    paths = [Path(line) for line in done.stdout.splitlines()]
    for age, path in enumerate(paths):
        os.utime(path.parent.with_name(f"{path.parent.name}.used"), (age, age))
    room = 2 * paths[0].stat().st_size + 30  # two of them and the new one
    monkeypatch.setenv("JAXTUNE_CACHE_GB", str(room / 1e9))
    new = Path(dataset_file([{"text": "new"}]))
    assert [path.exists() for path in [*paths, new]] == [False, True, True, True]


def test_the_file_is_readable_json_lines() -> None:
    lines = Path(dataset_file(ROWS)).read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == ROWS
