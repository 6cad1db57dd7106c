"""Scores and answers of one model or of two, side by side. Takes plain values only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxtune.draw.metrics import METRICS, between, change, is_difference, metric, verdict, written
from jaxtune.draw.terminal import printable

Row = Mapping[str, Any]
_LONGEST_LINE = 160
_COUNTS = ("eval_tokens_trained", "examples", "questions")  # said below the table
_OF_GROUPS = ("eval_loss", "exact_match")


def evaluation_text(columns: Mapping[str, Row]) -> str:
    """All that `evaluate --json` holds but the answers: a column per model, with intervals."""
    *_, last = columns.values()
    parts = [scores_text(columns), *_groups_texts(columns)]
    if "judge" in last:
        parts.append(_judge_text(last))
    if "harness" in last:
        parts.append(_harness_text(columns))
    if len(columns) > 1:
        parts.append(
            "  A difference is called better, worse, more or less only where its 95% interval "
            "excludes 0."
        )
    return "\n\n".join(parts)


def scores_text(columns: Mapping[str, Row]) -> str:
    """A row per score that is there: the interval of a model alone, or of how two differ.

    >>> print(scores_text({"model": {"exact_match": 0.965, "intervals": {"exact_match": [0.9, 1.0]}}}))
                         model  95% interval
      exact match        96.5%  90.0 to 100.0%
    """  # noqa: E501
    lines: list[Sequence[str]] = []
    for key, scores in [*_scores(columns), *_general(columns)]:
        name, how, _ = metric(key)
        label = f"{name}, general text" if scores is not columns else name
        row = [label, *(written(part[key], how) for part in scores.values())]
        *_, tuned = scores.values()
        if len(columns) == 1 and (ends := between(tuned.get("intervals", {}).get(key), how)):
            row.append(ends)
        if len(columns) > 1 and is_difference(found := tuned.get("difference", {}).get(key)):
            ends = between(found.get("interval"), how, signed=True)
            row += [change(found["value"], how), ends, verdict(key, found)]
        lines.append(row)
    names = [printable(name) for name in columns]
    more = ["95% interval"] if len(columns) == 1 else ["difference", "95% interval", ""]
    if all(len(line) == 1 + len(names) for line in lines):  # of a version that made none
        more = []
    return _aligned(["", *names, *more], lines, numbers=len(names) + (len(more) > 1))


def _scores(columns: Mapping[str, Row]) -> list[tuple[str, Mapping[str, Row]]]:
    return [
        (key, columns)
        for key in METRICS
        if key not in _COUNTS and all(key in scores for scores in columns.values())
    ]


def _general(columns: Mapping[str, Row]) -> list[tuple[str, Mapping[str, Row]]]:
    """Forgetting is read off the loss; the other two say the same."""
    if not all("general" in scores for scores in columns.values()):
        return []
    return [("eval_loss", {name: scores["general"] for name, scores in columns.items()})]


def _groups_texts(columns: Mapping[str, Row]) -> Iterable[str]:
    """A table per way of grouping: by data set where there are several, by the asked column."""
    *_, last = columns.values()
    ways = {
        "data set": {name: scores.get("by_dataset", {}) for name, scores in columns.items()},
        **{
            column: {name: scores["by_column"][column] for name, scores in columns.items()}
            for column in last.get("by_column", {})
        },
    }
    for way, sides in ways.items():
        if way == "data set" and len(sides[[*sides][-1]]) < 2:
            continue
        yield _group_text(way, sides)


def _group_text(way: str, sides: Mapping[str, Mapping[str, Row]]) -> str:
    *_, tuned = sides.values()
    keys = [key for key in _OF_GROUPS if any(key in row for row in tuned.values())]
    header = [f"by {_on_one_line(way)}", "examples"]
    for key in keys:
        header += [metric(key).name, *[""] * (len(sides) - 1)]
        header += ["difference", ""] if len(sides) > 1 else []
    lines = []
    for value, row in tuned.items():
        line = [_on_one_line(value), f"{row['examples']:,}"]
        for key in keys:
            how = metric(key).how
            line += [written(side[value].get(key, ""), how) for side in sides.values()]
            found = row.get("difference", {}).get(key)
            if len(sides) > 1:
                said = change(found["value"], how) if is_difference(found) else ""
                line += [said, verdict(key, found)]
        lines.append(line)
    return _aligned(header, lines, numbers=len(header))


def _judge_text(scores: Row) -> str:
    judge = scores["judge"]
    lines = [
        f"  judge {printable(judge['model'])}: {judge['wins']:,} wins, {judge['ties']:,} ties, "
        f"{judge['losses']:,} losses of tuned; the orders disagreed on {judge['inconsistent']:,}"
    ]
    without = [f"{judge[key]:,} {key}" for key in ("unparseable", "failed") if judge[key]]
    if without:
        lines.append(f"  without a verdict: {', '.join(without)}")
    ends = between(judge["interval"], ".1%")
    said = "" if judge["clear"] else ", not distinguishable from 50%"
    lines.append(
        f"  win rate {written(judge['win_rate'], '.1%')}" + (f" ({ends})" if ends else "") + said
    )
    return "\n".join(lines)


def _harness_text(columns: Mapping[str, Row]) -> str:
    *_, last = columns.values()
    lines = []
    for task, scores in last["harness"].items():
        for key in scores:
            if "_stderr" in key:
                continue
            cells = []
            for part in columns.values():
                found = part["harness"].get(task, {})
                error = found.get(_error(key))
                cells.append(
                    written(found.get(key, ""), ".4f")
                    + ("" if error is None else f" \u00b1{error:.4f}")
                )
            lines.append([_on_one_line(f"{task} {key}"), *cells])
    header = ["lm-evaluation-harness", *(printable(name) for name in columns)]
    return _aligned(header, lines, numbers=len(header))


def _error(key: str) -> str:
    """Its standard error: `acc` -> `acc_stderr`, `acc,filter` -> `acc_stderr,filter`."""
    name, comma, rest = key.partition(",")
    return f"{name}_stderr{comma}{rest}"


def _aligned(header: Sequence[str], lines: Sequence[Sequence[str]], *, numbers: int) -> str:
    """Columns two blanks apart: the first to the left, the next `numbers` to the right."""
    rows = [header, *(tuple(line) + ("",) * (len(header) - len(line)) for line in lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = max(15, widths[0])
    widths[1 : 1 + numbers] = [max(7, width) for width in widths[1 : 1 + numbers]]
    return "\n".join(
        "  "
        + "  ".join(
            cell.rjust(width) if 0 < number <= numbers else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def answers_text(question: str, expected: str, answers: Mapping[str, tuple[str, bool]]) -> str:
    """A question, what was expected, and what each model said: name -> (answer, stopped).

    >>> print(answers_text("2 + 2?", "4", {"base": ("and and", False), "tuned": ("4", True)}))
    > 2 + 2?
      expected  4
      base      and and (did not stop)
      tuned     4 (right)
    """
    lines = [f"> {_on_one_line(question)}", f"  {'expected':9} {_on_one_line(expected)}"]
    for name, (text, stopped) in answers.items():
        right = text.strip() == expected.strip()
        end = " (right)" if right else "" if stopped else " (did not stop)"
        lines.append(f"  {printable(name):9} {_on_one_line(text)}{end}")
    return "\n".join(lines)


def _on_one_line(text: str) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE] + " ..."
