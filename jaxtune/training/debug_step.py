"""Records of a step that went wrong, and the replay of that step, in detail.

OUT/step-N.json says which rows the batch held and how large each parameter's gradient was;
`train --replay_step N` goes there again from the checkpoint before it and adds the loss of each
row. A batch is a function of the seed and the step, so it is the same step.
"""

from __future__ import annotations

import functools
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune.data.dataset import Batches
from jaxtune.parallel.mesh import put_batch, row_shards
from jaxtune.storage.atomic_write import write_whole
from jaxtune.storage.jsonl import number
from jaxtune.training.program import Program
from jaxtune.training.state import TrainState
from jaxtune.training.step import StepMetrics

_SHOWN = 5


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / f"step-{step}.json"


def command_for(run_dir: Path, step: int) -> str:
    """Return the command that replays the step, as typed into a shell."""
    config = shlex.quote(str(run_dir / "config.yaml"))
    return f"python -m jaxtune.train --config {config} --replay_step {step}"


def describe(
    run_dir: Path,
    step: int,
    metrics: StepMetrics,
    names: Sequence[str],
    batches: Batches,
    checkpoint: int | None,
) -> dict[str, Any]:
    """The facts of step `step`, counted from 1; `names` are of the trained leaves, sorted, and
    `checkpoint` is the newest that counts."""
    norms = dict(zip(names, (number(norm) for norm in metrics.leaf_norms), strict=True))
    return {
        "step": step,
        "loss": number(metrics.loss),
        "grad_norm": number(metrics.grad_norm),
        "learning_rate": number(metrics.learning_rate),
        "tokens_trained": number(metrics.weight),
        "grad_norms": norms,
        "rows": rows_of(batches, step),
        "checkpoint": checkpoint,
        "replay": command_for(run_dir, step),
    }


def rows_of(batches: Batches, step: int) -> list[list[dict[str, Any]]]:
    """For each row of the batch its examples: data set, file or hub id, and the record from 0."""
    data = batches.dataset
    records, sources = data.gather("rows"), data.source_of
    return [
        [
            {
                "dataset": data.sources[sources[number]].name,
                "path": data.sources[sources[number]].path,
                "record": int(records[number]),
            }
            for number in row
        ]
        for row in batches.examples(step - 1)
    ]


def replay(
    step: int, program: Program, batches: Batches, start: int, state: TrainState, frozen: Any
) -> tuple[StepMetrics, list[float | str | None]]:
    """Steps `start + 1` to `step` as they were; of the last one its metrics and each row's loss,
    None for an empty row."""
    size: dict[str, Any] = {"length": batches.row_length, "mesh": program.mesh}
    losses: list[float | str | None] = []
    for number_of in range(start, step):
        part = functools.partial(batches.batch_rows, number_of)
        batch: Any = put_batch(part, batch_size=batches.batch_size, **size)
        if number_of == step - 1:  # before the step moves the parameters
            losses = _row_losses(program, batches.batch(number_of), state.trained, frozen, size)
        state, metrics = program.train_step(state, frozen, batch)
    return jax.device_get(metrics), losses


def _row_losses(
    program: Program, whole: Any, trained: Any, frozen: Any, size: Any
) -> list[float | str | None]:
    """Compute the loss of one row at a time, beside empty rows on the other devices."""
    shards = row_shards(program.mesh)

    def alone(row: int, low: int, high: int) -> Any:
        first = (np.arange(low, high) == 0)[:, None]
        return type(whole)(*(np.where(first, x[row], np.zeros_like(x[row])) for x in whole))

    sums = [
        program.eval_step(
            trained, frozen, put_batch(functools.partial(alone, row), batch_size=shards, **size)
        )
        for row in range(len(whole.inputs))
    ]
    fetched = jax.device_get(sums)
    return [number(row.loss / row.weight) if row.weight else None for row in fetched]


def write(path: Path, facts: dict[str, Any]) -> None:
    write_whole(path, json.dumps(facts, indent=1, allow_nan=False) + "\n")


def summary(facts: dict[str, Any]) -> str:
    """A replayed step in a few lines: the totals, and what stands out."""
    lines = [f"step {facts['step']}: loss {facts['loss']}, gradient norm {facts['grad_norm']}"]
    norms = sorted(facts["grad_norms"].items(), key=lambda item: _size(item[1]), reverse=True)
    lines += [f"  gradient norm {norm}  {name}" for name, norm in norms[:_SHOWN]]
    losses = facts["row_losses"]
    order = sorted(range(len(losses)), key=lambda row: _size(losses[row]), reverse=True)
    for row in order[:_SHOWN]:
        held = ", ".join(f"{e['path']} record {e['record']}" for e in facts["rows"][row][:3])
        lines.append(f"  loss {losses[row]}  row {row}: {held or 'empty'}")
    return "\n".join(lines)


def _size(value: float | str | None) -> float:
    """Return a key to sort by: a value that is not finite is the largest."""
    return math.inf if isinstance(value, str) else value or 0.0
