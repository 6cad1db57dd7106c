"""The object of `evaluate --json` as tables of text, for the terminal, the page and the model card.

Takes plain values only, also such as other versions wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtune.evaluation.metric_names import (
    METRICS,
    between,
    change,
    is_difference,
    is_number,
    metric,
    verdict,
    written,
)

Row = Mapping[str, Any]
LEGEND = (
    "A difference is called better, worse, more or less only where its 95% interval excludes 0."
)
_NONE = "\u2013"
_COUNTS = ("eval_tokens_trained", "examples", "questions")
_OF_GROUPS = ("eval_loss", "label_accuracy", "exact_match")


class Sheet(NamedTuple):
    """A table of text. The first cell of a row is its name, the next `numbers` are numbers, the
    others words."""

    caption: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    numbers: int


def score_sheet(columns: Mapping[str, Row], *, counts: bool = False) -> Sheet:
    """Make a row per score: with the interval of a model alone, or of how two differ.

    `counts`: also of how much it was measured on.
    """
    *_, last = columns.values()
    keys = [key for key in METRICS if (counts or key not in _COUNTS) and _all_have(columns, key)]
    keys += [key for key, value in last.items() if key not in METRICS and is_number(value)]
    rows = [_score_row(metric(key).name, key, columns) for key in keys]
    if _all_have(columns, "general"):  # forgetting is read off the loss; the others say the same
        general = {name: scores["general"] for name, scores in columns.items()}
        rows.append(_score_row("loss, general text", "eval_loss", general))
    more: tuple[str, ...] = ()
    if any(len(row) > 1 + len(columns) for row in rows):
        more = ("95% interval",) if len(columns) == 1 else ("difference", "", "95% interval")
    return Sheet("", ("", *columns, *more), rows, len(columns) + (len(more) > 1))


def few_shot_sheet(columns: Mapping[str, Row]) -> Sheet | None:
    """Compare the last model with the first, given examples in its prompts."""
    first, last = next(iter(columns)), list(columns)[-1]
    shown = columns[last].get("few_shot")
    if not shown:
        return None
    tuned = {**columns[last], "difference": shown.get("difference", {})}
    tuned.pop("general", None)
    sheet = score_sheet({f"{first}, {shown['shots']}-shot": shown, last: tuned})
    return sheet._replace(caption=f"with {shown['shots']} examples in each prompt of {first}")


def group_sheets(columns: Mapping[str, Row]) -> list[Sheet]:
    """Make a table per grouping: by data set if there are several, and by the columns chosen."""
    *_, last = columns.values()
    sheets = []
    if len(last.get("by_dataset", {})) > 1:
        sides = {name: scores.get("by_dataset", {}) for name, scores in columns.items()}
        sheets.append(_group_sheet("data set", sides))
    for column in last.get("by_column", {}):
        sides = {
            name: scores.get("by_column", {}).get(column, {}) for name, scores in columns.items()
        }
        sheets.append(_group_sheet(column, sides))
    return sheets


def harness_sheet(columns: Mapping[str, Row]) -> Sheet | None:
    """List public benchmarks, each with its standard error as the harness has it."""
    *_, last = columns.values()
    rows = [
        (
            f"{task} {key}",
            *(
                _with_error(scores.get("harness", {}).get(task, {}), key)
                for scores in columns.values()
            ),
        )
        for task, results in last.get("harness", {}).items()
        for key in results
        if "_stderr" not in key
    ]
    if not rows:
        return None
    return Sheet("lm-evaluation-harness", ("", *columns), rows, len(columns))


def judge_lines(scores: Row) -> list[str]:
    """Write the verdicts of a judge in sentences; none without a judge."""
    judge = scores.get("judge")
    if not judge:
        return []
    lines = [
        f"Judge {judge['model']}: {judge['wins']:,} wins, {judge['ties']:,} ties, "
        f"{judge['losses']:,} losses of tuned; the two orders disagreed on "
        f"{judge['inconsistent']:,}."
    ]
    without = [f"{judge[key]:,} {key}" for key in ("unparseable", "failed") if judge[key]]
    if without:
        lines.append(f"Without a verdict: {', '.join(without)}.")
    ends = between(judge.get("interval"), ".1%")
    rate = written(judge.get("win_rate"), ".1%")
    chance = "" if judge.get("clear") else ", not told apart from 50%"
    lines.append(f"Win rate {rate}{f' ({ends})' if ends else ''}{chance}.")
    return lines


def _all_have(columns: Mapping[str, Row], key: str) -> bool:
    return all(key in scores for scores in columns.values())


def _score_row(label: str, key: str, columns: Mapping[str, Row]) -> tuple[str, ...]:
    *before, last = columns.values()
    how = metric(key).how
    row = [label, *(written(scores.get(key), how) for scores in columns.values())]
    if not before:
        ends = between(last.get("intervals", {}).get(key), how)
        return (*row, ends) if ends else tuple(row)
    difference = last.get("difference", {}).get(key)
    if is_difference(difference):
        ends = between(difference.get("interval"), how, signed=True)
        return (*row, change(difference["value"], how), verdict(key, difference), ends)
    values: list[Any] = [scores.get(key) for scores in columns.values()]
    if key in _COUNTS or not all(map(is_number, values)):
        return tuple(row)
    return (*row, change(values[-1] - values[0], how))  # of a version that made no intervals


def _group_sheet(way: str, sides: Mapping[str, Mapping[str, Row]]) -> Sheet:
    *_, last = sides.values()
    keys = [key for key in _OF_GROUPS if any(key in row for row in last.values())]
    counts = [c for c in ("examples", "questions") if any(c in row for row in last.values())]
    header = ["", *counts]
    for key in keys:
        name = metric(key).name
        header += [name] if len(sides) == 1 else [*(f"{name}, {side}" for side in sides), ""]
    rows = []
    for value, row in last.items():
        line = [value, *(written(row.get(count, ""), ",") for count in counts)]
        for key in keys:
            of_it = [side.get(value, {}) for side in sides.values()]
            how = metric(key).how
            line += [written(s[key], how) if key in s else _NONE for s in of_it]
            if len(sides) > 1:
                line.append(verdict(key, row.get("difference", {}).get(key)))
        rows.append(tuple(line))
    return Sheet(f"by {way}", tuple(header), rows, len(header) - 1)


def _with_error(results: Mapping[str, Any], key: str) -> str:
    """Write `acc` with its `acc_stderr`, `acc,filter` with its `acc_stderr,filter`."""
    name, comma, rest = key.partition(",")
    error = results.get(f"{name}_stderr{comma}{rest}")
    value = written(results.get(key, ""), ".4f")
    return f"{value} \u00b1{error:.4f}" if is_number(error) else value


def sheets(columns: Mapping[str, Row], *, counts: bool = False) -> list[Sheet]:
    """Make all tables of an evaluation, with rows as long as their header."""
    every = [
        score_sheet(columns, counts=counts),
        few_shot_sheet(columns),
        *group_sheets(columns),
        harness_sheet(columns),
    ]
    return [
        sheet._replace(rows=[(*row, *[""] * (len(sheet.header) - len(row))) for row in sheet.rows])
        for sheet in every
        if sheet is not None
    ]


def sheets_of(evaluation: Row) -> list[Sheet]:
    """Make all tables of the object of `evaluate --json`, the counts included."""
    base = evaluation.get("base")
    columns = {"base": base, "tuned": evaluation} if base else {"model": evaluation}
    return sheets(columns, counts=True)
