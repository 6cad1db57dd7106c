"""README's first command: from random weights to a support desk that knows when to stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def door(name: str, *argv: str) -> str:
    """stdout of `python -m jaxtune.<name>`, as the Makefile runs it: one device, from the root."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", f"jaxtune.{name}", *argv],
        capture_output=True, text=True, timeout=600, cwd=ROOT, env=env, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_held_out_combinations_are_answered_and_ended(tmp_path: Path) -> None:
    out = tmp_path / "out"
    door("train", "--config", "configs/quickstart/quickstart.yaml", "--output_dir", str(out))
    scores = json.loads(
        door(
            "evaluate", "--config", str(out / "config.yaml"), "--model_name_or_path",
            str(out / "hf"), "--base", "configs/quickstart/model", "--generate", "200", "--json",
        )
    )  # fmt: skip
    assert scores["base"]["exact_match"] == 0.0
    assert scores["exact_match"] >= 0.8
    assert scores["stop_rate"] >= 0.98
    assert len(scores["generations"]) == 200
    assert scores["eval_loss"] < 0.2 < scores["base"]["eval_loss"]
