"""A run directory read back: metrics, samples, starts, config; and the answers of `evaluate`.

A run may still be going, or may have been killed while it wrote: the last line of a file may be
torn; it is then left out, with a note. A broken line anywhere else is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, NonNegativeInt

from jaxtune.config import ConfigError, DataError, parse_model
from jaxtune.reporting import starts
from jaxtune.storage.jsonl import from_json
from jaxtune.storage.safe_read import parse_json, reason

EXAMPLES = 10  # rows of the data on the page of a run
EVALUATION = "evaluation.json"  # where `report` looks for what `evaluate --json` printed
Row = dict[str, Any]


class _Object(BaseModel):
    """An object of a run's file: the fields that a page needs; others are as they are."""

    model_config = ConfigDict(strict=True)


class _Metrics(_Object):
    kind: str
    step: NonNegativeInt
    by_dataset: dict[str, Row] = {}


class _TrainMetrics(_Metrics):
    loss: float | None


class _EvalMetrics(_Metrics):
    eval_loss: float | None


_METRICS: Mapping[str, type[_Metrics]] = {"train": _TrainMetrics, "eval": _EvalMetrics}


class _Sample(_Object):
    step: NonNegativeInt
    prompt: str
    response: str


class _Start(_Object):
    step: NonNegativeInt
    versions: Row = {}


class _Scores(_Object):
    intervals: Row = {}
    difference: Row = {}


class _Generation(_Object):
    prompt: str
    reference: str
    response: str


class _Verdicts(_Object):
    model: Any
    wins: NonNegativeInt
    ties: NonNegativeInt
    losses: NonNegativeInt
    inconsistent: NonNegativeInt
    unparseable: NonNegativeInt
    failed: NonNegativeInt


class _FewShot(_Scores):
    shots: NonNegativeInt


class _Evaluation(_Scores):
    eval_loss: Any
    generations: list[_Generation] = []
    by_dataset: dict[str, _Scores] = {}
    by_column: dict[str, dict[str, _Scores]] = {}
    harness: dict[str, Row] = {}
    general: _Scores = _Scores()
    few_shot: _FewShot = None  # type: ignore[assignment]  # absent without examples
    judge: _Verdicts | None = None
    base: _Evaluation = None  # type: ignore[assignment]  # absent without a second model


class RunFiles(NamedTuple):
    """A run directory: `train` and `evals` are rows of metrics.jsonl by step; `notes` list what
    was left out."""

    folder: Path
    train: list[Row]
    evals: list[Row]
    samples: list[Row]
    starts: list[Row]
    config: str | None
    notes: list[str]


def read_run(folder: Path) -> RunFiles:
    """Read a run directory.

    Raises: `ConfigError` for what is no run directory, `DataError` for a broken line.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "there is no such folder"
        raise ConfigError(f"{folder}: {what}. Give the output_dir of a training run.")
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        there = sorted(path.name for path in folder.iterdir())
        has = ", ".join(there[:8]) + (" ..." if len(there) > 8 else "") or "nothing"
        raise ConfigError(
            f"{folder}: expected metrics.jsonl, which every run writes; the folder has: {has}. "
            "Give the output_dir of a training run."
        )
    notes: list[str] = []
    rows = [_metrics(row, where) for where, row in _lines(metrics, notes)]
    config = folder / "config.yaml"
    return RunFiles(
        folder,
        [row for row in rows if row["kind"] == "train"],
        [row for row in rows if row["kind"] == "eval"],
        _rows(folder / "samples.jsonl", _Sample, notes),
        _rows(folder / starts.NAME, _Start, notes),
        config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
        notes,
    )


def read_evaluation(file: Path) -> Row:
    """Read what `evaluate --json` printed. Raises `ConfigError` when the file holds something
    else."""
    try:
        evaluation = parse_json(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(
            f"{file}: not readable as JSON: {error}. Give what 'jaxtune evaluate --json' printed."
        ) from None
    try:
        if not isinstance(evaluation, dict):
            raise ConfigError(f"{file}: expected an object; got {_short(evaluation)}.")
        parse_model(_Evaluation, evaluation, where=str(file))
    except ConfigError as error:
        raise ConfigError(f"{error} Give what 'jaxtune evaluate --json' printed.") from None
    return evaluation


def _rows(file: Path, model: type[_Object], notes: list[str]) -> list[Row]:
    lines = _lines(file, notes)
    for where, row in lines:
        parse_model(model, row, where=where, raises=DataError)
    return [row for _, row in lines]


def _lines(file: Path, notes: list[str]) -> list[tuple[str, Row]]:
    """Read (file:line, object) of every line; none where there is no file."""
    if not file.is_file():
        return []
    rows = []
    lines = file.read_bytes().split(b"\n")
    last = max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)
    for number, line in enumerate(lines[:last], 1):
        where = f"{file}:{number}"
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            if number == last:
                notes.append(
                    f"The last line of {file.name} is not whole: the run was killed while it "
                    "wrote, or is writing now. It is left out."
                )
                break
            raise DataError(
                f"{where}: not valid JSON: {reason(error)}. Only a last line may be torn. Mend "
                "this line, or remove it."
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object; got {_short(row)}.")
        rows.append((where, row))
    return rows


def _metrics(row: Row, where: str) -> Row:
    row = from_json(row)
    parse_model(_METRICS.get(str(row.get("kind")), _Metrics), row, where=where, raises=DataError)
    return row


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
