"""The values that commands return; light to import."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class TrainResult(NamedTuple):
    """A finished run: `model_dir` is the exported folder (None with `export: false`), `step` the
    last step, `adapter_dir` the adapter's folder if there is one.

    `metrics` are the last train and eval rows of metrics.jsonl, by kind. `replay_summary` is a text
    on the first host after `train --replay_step`, which trains nothing.
    """

    output_dir: Path
    model_dir: Path | None
    step: int
    metrics: Mapping[str, Mapping[str, Any]]
    adapter_dir: Path | None = None
    replay_summary: str = ""
