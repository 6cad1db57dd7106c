"""`run` of every command from Python: its result is a value, and stdout stays the caller's."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from tiny import write_model

from jaxtune.__main__ import COMMANDS
from jaxtune.config import load

ROWS = [{"instruction": f"Where is number {i}?", "output": f"In Oslo {i % 4}"} for i in range(8)]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("preview", {"examples": 1}),
    ("preview", {"as_json": True}),
    ("plan", {"topology": "cpu"}),
    ("plan", {"topology": "cpu", "as_json": True}),
    ("train", {}),
    ("train", {"replay_step": 2}),
    ("evaluate", {"generate": 1, "max_new_tokens": 2}),
    ("evaluate", {"as_json": True}),
    ("chat", {"prompt": "Where?", "max_new_tokens": 2}),
    ("chat", {"prompts": "prompts.jsonl", "max_new_tokens": 2}),
    ("report", {"run_dir": "out"}),
    ("convert", {"run_or_checkpoint": "out", "out_dir": "converted"}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, prompts, and `out`, a run on them."""
    folder = tmp_path_factory.mktemp("quiet")
    write_model(folder / "model", layers=1, positions=128)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "prompts.jsonl").write_text('{"prompt": "Where?"}\n')
    train = importlib.import_module("jaxtune.train")
    train.run(load(overrides=settings(folder)))
    return folder


def settings(folder: Path, out: str = "out") -> dict[str, Any]:
    return {
        "model_name_or_path": str(folder / "model"), "init": "random", "template": "auto",
        "dataset": str(folder / "data.jsonl"), "output_dir": str(folder / out), "max_length": 64,
        "global_batch_size": 8, "per_device_train_batch_size": 1, "max_steps": 2, "save_steps": 1,
    }  # fmt: skip


def test_every_command_is_here() -> None:
    assert {command for command, _ in CASES} == set(COMMANDS)


@pytest.mark.parametrize(("command", "options"), CASES)
def test_run_prints_nothing(
    command: str,
    options: dict[str, Any],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # in which `plan` sets its own
    monkeypatch.chdir(folder)
    module = importlib.import_module(f"jaxtune.{command}")
    out = "new" if (command, options) == ("train", {}) else "out"
    config = load(overrides=settings(folder, out))
    result = module.run(config, getattr(module, f"{command.title()}Options")(**options))
    assert capsys.readouterr().out == ""
    assert result is not None
    if "replay_step" in options:
        assert result.replay_summary.startswith("step 2: loss ")
