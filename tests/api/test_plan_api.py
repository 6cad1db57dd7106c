"""`jt.plan` returns what `plan --json` prints, and prints nothing itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

import jaxtune as jt

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(ROOT / "configs" / "models" / "Qwen3-0.6B")
QUICKSTART = ROOT / "configs" / "quickstart"


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends with the test what is set for the compiler."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def printed(capsys: pytest.CaptureFixture[str], flags: dict[str, Any]) -> Any:
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    assert jt.plan.main([*argv, "--json"]) == 0  # type: ignore[attr-defined]
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"model_name_or_path": MODEL}, {"topology": "v5e-16", "compile": False}),
        (
            {"model_name_or_path": str(QUICKSTART / "model"), "max_length": 256,
             "dataset": str(QUICKSTART / "train.jsonl"), "max_steps": 7},
            {"topology": "h100-2", "price_per_chip_hour": 2.5},
        ),
    ],
)  # fmt: skip
def test_the_value_is_what_the_command_prints(
    capsys: pytest.CaptureFixture[str], fields: dict[str, Any], options: dict[str, Any]
) -> None:
    result = jt.plan(jt.load_config(fields), **options)
    written = capsys.readouterr()
    assert (written.out, written.err) == ("", "")
    assert json.loads(json.dumps(result.plan)) == printed(capsys, {**fields, **options})
    assert "FITS: " in result.text()
    assert result.config == jt.load_config(fields)


def test_a_search_returns_its_choice_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"model_name_or_path": MODEL, "per_device_train_batch_size": 8}
    monkeypatch.chdir(tmp_path)
    result = jt.plan(jt.load_config(fields), topology="h100-2", search=True)
    written = capsys.readouterr()
    assert (written.out, written.err, list(tmp_path.iterdir())) == ("", "", [])
    assert result.plan["fits"]
    assert result.text().split()[:3] == ["GiB", "tokens/s", "settings"]
    command = {**fields, "topology": "h100-2", "search": True, "search_output": "chosen.yaml"}
    assert printed(capsys, command)["frontier"] == result.plan["frontier"]
    chosen = yaml.safe_load(Path("chosen.yaml").read_text())
    assert jt.load_config(chosen) == result.config


def test_mistakes_are_errors() -> None:
    config = jt.load_config(model_name_or_path=MODEL)
    with pytest.raises(jt.ConfigError, match="'v9-8' is not known"):
        jt.plan(config, topology="v9-8")
    with pytest.raises(jt.ConfigError, match="model_name_or_path is not set"):
        jt.plan(jt.load_config(), topology="v5e-8")


def test_options_are_checked_like_flags() -> None:
    with pytest.raises(jt.ConfigError, match=r"plan: search_minutes: .* greater than 0; got -1"):
        jt.plan({"model_name_or_path": "M"}, topology="v5e-8", search_minutes=-1)
