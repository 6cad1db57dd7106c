"""`jaxtune.evaluate` from Python: the numbers of the command, on data in memory, and no output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands.conftest import Parrot

import jaxtune as jt
from jaxtune import evaluate

ROWS = [
    {"instruction": "May I?", "output": "Yes, you can"},
    {"instruction": "Is it late?", "output": "Sorry, we cannot."},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(Parrot(tmp_path_factory.mktemp("parrot") / "hf", "Yes, you can").folder)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path / "cache"))


def test_the_numbers_of_the_command(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = jt.load_config(model_name_or_path=model, max_length=64)
    result = jt.evaluate(config, ROWS, generate=2)
    assert capsys.readouterr().out == ""
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    argv = ["--model_name_or_path", model, "--max_length", "64", "--dataset", str(file)]
    assert evaluate.main([*argv, "--generate", "2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(result.scores))
    assert printed["exact_match"] == 0.5
    assert evaluate.main([*argv, "--generate", "2"]) == 0
    assert capsys.readouterr().out == f"{result}\n"
    assert jt.evaluate(config, file, generate=2).scores == result.scores


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generat": 1}, "generat"),
        ({"generate": -1}, "generate"),
        ({"judge": "http://x"}, "compares the answers of two models"),
    ],
)
def test_options_are_those_of_the_command(
    model: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(jt.ConfigError, match=message):
        jt.evaluate(jt.load_config(model_name_or_path=model), ROWS, **options)


def test_rows_that_are_none(model: str) -> None:
    with pytest.raises(jt.DataError, match="holds no rows"):
        jt.evaluate(jt.load_config(model_name_or_path=model), [])
