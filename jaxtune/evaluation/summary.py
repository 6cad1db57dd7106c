"""The JSON object of `evaluate`: by dataset, by value of a column, of both models, each score with
its interval and its difference."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxtune.evaluation.measured import Measured
from jaxtune.evaluation.questions import Column
from jaxtune.evaluation.scores.bootstrap import (
    FEWEST_PAIRS,
    Bootstrap,
    Interval,
    differences,
    intervals,
)
from jaxtune.evaluation.scores.score import Scores, take

Row = dict[str, Any]


class Groups(NamedTuple):
    """A grouping of examples and questions: `datasets` is that of each example, `questions` the
    example of each question."""

    datasets: NDArray[np.object_]
    questions: NDArray[np.int64]
    column: Column | None


def summaries(measured: Mapping[str, Measured], groups: Groups, how: Bootstrap) -> dict[str, Row]:
    """Sum up one model, or base and tuned, of which the second is compared with the first."""
    *base, tuned = measured.values()
    rows = [_summary(each, None, groups, how) for each in base]
    rows.append(_summary(tuned, base[0] if base else None, groups, how))
    return dict(zip(measured, rows, strict=True))


def _summary(measured: Measured, base: Measured | None, groups: Groups, how: Bootstrap) -> Row:
    def of(is_in: NDArray[np.bool_]) -> Row:
        return _group(measured, base, groups, is_in, how)

    names = groups.datasets
    row = of(np.ones(len(names), bool))
    row["by_dataset"] = {name: of(names == name) for name in dict.fromkeys(names.tolist())}
    if groups.column is not None:
        values = groups.column.values
        common = [value for value, _ in Counter(values.tolist()).most_common()]
        row["by_column"] = {groups.column.name: {v: of(values == v) for v in common}}
    if measured.general:
        row["general"] = {
            **_scored(measured.general, None if base is None else base.general, how),
            "eval_tokens_trained": measured.general_tokens,
        }
    row["bootstrap"] = how._asdict()
    if measured.judge is not None:
        ends = row["intervals"]["win_rate"]
        decided = measured.judge["wins"] + measured.judge["losses"]
        excludes = ends is not None and not ends[0] <= 0.5 <= ends[1]
        row["judge"] = {
            **measured.judge,
            "win_rate": row["win_rate"],
            "interval": ends,
            "clear": excludes and decided >= FEWEST_PAIRS,
        }
    if measured.generations:
        row["generations"] = measured.generations
    return row


def _group(
    measured: Measured,
    base: Measured | None,
    groups: Groups,
    is_in: NDArray[np.bool_],
    how: Bootstrap,
) -> Row:
    examples, questions = np.flatnonzero(is_in), np.flatnonzero(is_in[groups.questions])

    def scored(name: str, chosen: NDArray[np.int64]) -> Row:
        before = None if base is None else take(getattr(base, name), chosen)
        return _scored(take(getattr(measured, name), chosen), before, how)

    row = scored("losses", examples)
    row["eval_tokens_trained"] = int(measured.tokens[examples].sum())
    row["examples"] = len(examples)
    if len(questions):
        for key, value in scored("answers", questions).items():
            row[key] = {**row[key], **value} if key in row else value
        row["questions"] = len(questions)
    return row


def _scored(scores: Scores, base: Scores | None, how: Bootstrap) -> Row:
    row: Row = {name: _finite(score.point()) for name, score in scores.items()}
    row["intervals"] = {name: _ends(ends) for name, ends in intervals(scores, how).items()}
    if base is not None:
        row["difference"] = {
            name: {
                "value": _finite(change.value),
                "interval": _ends(change.interval),
                "clear": change.clear,
            }
            for name, change in differences(base, scores, how).items()
        }
    return row


def _finite(value: float) -> float | None:
    """Return None for infinity and NaN, which JSON does not have."""
    return value if math.isfinite(value) else None


def _ends(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [float(end) for end in interval]
