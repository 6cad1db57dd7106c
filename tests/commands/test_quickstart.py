"""README's first command: from random weights to a support desk that knows when to stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import children
import pytest

ROOT = Path(__file__).resolve().parents[2]


def command(name: str, *argv: str, flags: str = "") -> str:
    """stdout of `python -m jaxtune.<name>`, as the Makefile runs it: one device, from the root."""
    done = subprocess.run(
        [sys.executable, "-m", f"jaxtune.{name}", *argv], capture_output=True, text=True,
        timeout=600, cwd=ROOT, env={**os.environ, "XLA_FLAGS": flags}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# After three epochs of seven, 65 of the first 100 answers are exact on the CPU, after all 95%.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("epochs", "questions", "exact"),
    [("3", 100, 0.5), pytest.param("7", 200, 0.8, marks=pytest.mark.nightly)],
)
def test_held_out_combinations_are_answered_and_ended(
    epochs: str, questions: int, exact: float, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command(
        "train", "--config", "configs/quickstart/quickstart.yaml", "--output_dir", str(out),
        "--num_train_epochs", epochs,
    )  # fmt: skip
    scores = json.loads(
        command(
            "evaluate", "--config", str(out / "config.yaml"), "--model_name_or_path",
            str(out / "hf"), "--base", "configs/quickstart/model", "--generate", str(questions),
            "--json", flags=children.environment(1)["XLA_FLAGS"],
        )
    )  # fmt: skip
    assert scores["base"]["exact_match"] == 0.0
    assert scores["exact_match"] >= exact
    assert scores["stop_rate"] >= 0.98
    assert len(scores["generations"]) == questions
    assert scores["eval_loss"] < 0.2 < scores["base"]["eval_loss"]
