"""Public benchmarks by lm-evaluation-harness, on a folder in HF format.

A process of its own with torch and transformers: users of the folder get the same numbers.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.cli import note
from jaxtune.config import ConfigError

_LAST_LINES = 3  # of the harness's messages, when it fails


def folder_of(name: str) -> str:
    """Name a model for the harness: a hub id, a folder in HF format, or a run's RUN/hf.

    Raises `ConfigError` for what it cannot take, and where it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("harness: lm_eval is not installed. pip install 'jaxtune[harness]'")
    folder = Path(name).expanduser()
    if not folder.is_dir():  # a hub id
        return name
    if (folder / "hf").is_dir():
        folder /= "hf"
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"harness: {folder} holds no weights in HF format. Give an exported folder, as "
            "RUN/hf; `jaxtune convert` makes one of a checkpoint or an adapter."
        )
    if "," in str(folder) or "=" in str(folder):
        raise ConfigError(f"harness: lm_eval cannot be given a path with , or =: {folder}")
    return str(folder)


def run(name: str, tasks: Sequence[str], more: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Run tasks on a model and return {task: {metric: value}}, None for what is not finite.

    `tasks` are names that the harness knows or YAML files of tasks; `more` are its own flags.
    Standard errors are called `METRIC_stderr`.

    Raises `ConfigError` with the end of its messages when it fails.
    """
    note(f"harness: {', '.join(tasks)} on {name}")
    with tempfile.TemporaryDirectory() as out:
        command = [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "hf"),
            *("--model_args", f"pretrained={name}", "--tasks", *tasks),
            *("--output_path", out, *more),
        ]
        done = subprocess.run(
            command,
            env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        files = sorted(Path(out).rglob("results*.json"))
        if done.returncode or not files:
            messages = [line for line in done.stderr.splitlines() if line.strip()]
            raise ConfigError(
                f"harness: lm_eval ended with {done.returncode}: "
                f"{' | '.join(messages[-_LAST_LINES:]) or 'it said nothing'}"
            )
        return _results(json.loads(files[-1].read_text(encoding="utf-8")))


def _results(output: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Read scores, `acc,none` as `acc`: only another filter than none stays in the name."""
    return {
        task: {
            key.removesuffix(",none"): float(value) if math.isfinite(value) else None
            for key, value in scores.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and "," in key
        }
        for task, scores in output["results"].items()
    }
