"""`jaxtune.preview` from Python: the objects of the command, of data in memory, and no output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from data.made import NAMES, byte_level_backend, save

import jaxtune as jt
from jaxtune import preview

ROWS = [
    {"instruction": "Name a prime.", "input": "", "output": "Seven."},
    {"instruction": "Nothing?", "input": "", "output": ""},
    {"instruction": "Add.", "input": "1 + 1", "output": "Two."},
]


@pytest.fixture
def tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path / "cache"))
    save(tmp_path / "tokenizer", byte_level_backend(), **NAMES)
    return str(tmp_path / "tokenizer")


def test_the_objects_of_the_command(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    argv = ["--dataset", str(file), "--tokenizer_name", tokenizer]

    def printed(*more: str) -> list[Any]:
        assert preview.main([*argv, *more]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    examples, (report,) = printed("--json"), printed("--json", "--stats")
    config = jt.load_config(tokenizer_name=tokenizer)
    for data in (ROWS, datasets.Dataset.from_list(ROWS), file):
        result = jt.preview(config, data)
        assert capsys.readouterr().out == ""
        assert [example._asdict() for example in result.examples] == examples
        assert result.report is not None
        assert result.report["examples"] == 2
    assert json.loads(json.dumps(result.report)) == report  # of the file: it names places in it
    assert [example.dropped is None for example in result.examples] == [True, False, True]


def test_a_limit_of_examples_and_columns_of_the_report(tokenizer: str) -> None:
    config = jt.load_config(tokenizer_name=tokenizer)
    result = jt.preview(config, ROWS, limit=1, columns=["input"])
    assert [example.row for example in result.examples] == [0]
    assert result.report is not None
    assert result.report["records"] == 3
    assert result.report["columns"]["input"]["1 + 1"]["examples"] == 1


def test_mistakes_in_arguments(tokenizer: str) -> None:
    config = jt.load_config(tokenizer_name=tokenizer)
    with pytest.raises(jt.ConfigError, match="limit is -1; expected"):
        jt.preview(config, ROWS, limit=-1)
    with pytest.raises(jt.DataError, match=r"columns: no record that is trained has .* 'text'"):
        jt.preview(config, ROWS, columns="text")  # one column, not its letters
    with pytest.raises(jt.ConfigError, match=r"config: expected a mapping, .* got \[\{"):
        jt.preview(ROWS)  # data where the config belongs
    rows = [{"prompt": "a", "completion": "b"}] * 9
    with pytest.raises(jt.DataError, match=r"^data\[9\]: format .* needs 'completion'"):
        jt.preview(config, [*rows, {"prompt": "a"}])
    lost = jt.preview(config, [{"prompt": "a", "completion": ""}] * 2)  # shown, not refused
    assert [example.dropped for example in lost.examples] == ["empty answer: message 2"] * 2
    assert lost.report is not None
    assert lost.report["by_dataset"]["data"]["dropped_share"] == 1.0


def test_without_data(tokenizer: str) -> None:
    with pytest.raises(jt.ConfigError, match="dataset is not set"):
        jt.preview(jt.load_config(tokenizer_name=tokenizer))
