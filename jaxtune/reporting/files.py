"""A run directory read back: metrics, samples, starts, config; and the answers of `evaluate`.

A run may still be going, or may have been killed while it wrote: the last line of a file may be
torn, and then it is left out and said so. A broken line anywhere else is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.config import ConfigError, DataError
from jaxtune.reporting import starts
from jaxtune.storage.jsonl import from_json
from jaxtune.storage.safe_read import parse_json, reason

EXAMPLES = 10  # rows of the data on the page of a run
EVALUATION = "evaluation.json"  # where `report` looks for what `evaluate --json` printed
Row = dict[str, Any]
# What a row of these kinds must have beside kind and step; every number may be null.
_NUMBERS = {"train": ("loss",), "eval": ("eval_loss",)}


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
    rows = [_metric(row, where) for where, row in _lines(metrics, notes)]
    config = folder / "config.yaml"
    return RunFiles(
        folder,
        [row for row in rows if row["kind"] == "train"],
        [row for row in rows if row["kind"] == "eval"],
        [_sample(row, where) for where, row in _lines(folder / "samples.jsonl", notes)],
        [_start(row, where) for where, row in _lines(folder / starts.NAME, notes)],
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
    if not _is_evaluation(evaluation):
        came = (
            ", ".join(map(str, evaluation))
            if isinstance(evaluation, dict)
            else type(evaluation).__name__
        )
        raise ConfigError(
            f"{file}: expected one object with eval_loss, as 'jaxtune evaluate --json' prints it; "
            f"got {came[:200] or 'an empty object'}."
        )
    return dict(evaluation)


def _is_evaluation(evaluation: Any) -> bool:
    if not _is_scored(evaluation) or "eval_loss" not in evaluation:
        return False
    answers = evaluation.get("generations", [])
    groups = [evaluation.get("by_dataset", {})]
    by_column = evaluation.get("by_column", {})
    harness = evaluation.get("harness", {})
    if not isinstance(by_column, dict) or not isinstance(harness, dict):
        return False
    groups += by_column.values()
    return (
        isinstance(answers, list)
        and all(
            isinstance(row, dict)
            and all(isinstance(row.get(k), str) for k in ("prompt", "reference", "response"))
            for row in answers
        )
        and all(isinstance(g, dict) and all(map(_is_scored, g.values())) for g in groups)
        and all(isinstance(scores, dict) for scores in harness.values())
        and _is_scored(evaluation.get("general", {}))
        and _is_judged(evaluation.get("judge"))
        and ("base" not in evaluation or _is_evaluation(evaluation["base"]))
    )


def _is_scored(scores: Any) -> bool:
    return isinstance(scores, dict) and all(
        isinstance(scores.get(key, {}), dict) for key in ("intervals", "difference")
    )


def _is_judged(judge: Any) -> bool:
    counts = ("wins", "ties", "losses", "inconsistent", "unparseable", "failed")
    return judge is None or (
        isinstance(judge, dict)
        and "model" in judge
        and all(_is_count(judge.get(c)) for c in counts)
    )


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


def _metric(row: Row, where: str) -> Row:
    kind, step = row.get("kind"), row.get("step")
    if not isinstance(kind, str) or not _is_count(step):
        raise DataError(
            f'{where}: expected "kind" and a whole "step" from 0; got kind {_short(kind)}, step '
            f"{_short(step)}."
        )
    row = from_json(row)
    for name in _NUMBERS.get(kind, ()):
        if name not in row or not _is_number(row[name]):
            raise DataError(f'{where}: expected a number as "{name}"; got {_short(row.get(name))}.')
    parts = row.get("by_dataset", {})
    if not isinstance(parts, dict) or not all(isinstance(p, dict) for p in parts.values()):
        raise DataError(f'{where}: expected objects by name as "by_dataset"; got {_short(parts)}.')
    return row


def _sample(row: Row, where: str) -> Row:
    if not (
        _is_count(row.get("step"))
        and isinstance(row.get("prompt"), str)
        and isinstance(row.get("response"), str)
    ):
        raise DataError(f'{where}: expected "step", "prompt" and "response"; got {_short(row)}.')
    return row


def _start(row: Row, where: str) -> Row:
    if not _is_count(row.get("step")) or not isinstance(row.get("versions", {}), Mapping):
        raise DataError(f'{where}: expected a whole "step" and "versions"; got {_short(row)}.')
    return row


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
