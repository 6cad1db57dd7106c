"""Scores and answers of one model or of two, side by side. Takes plain values only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.evaluation.questions import Question
from jaxtune.evaluation.tables import LEGEND, Sheet, judge_lines, sheets
from jaxtune.terminal.text import aligned, printable

_LONGEST_LINE = 160
_SHOWN = 5  # questions, spread over all


def result_text(
    scores: Mapping[str, Mapping[str, Any]], questions: Sequence[Question], model: str
) -> str:
    """Write a few answers, the scores, and how much they were measured on."""
    parts = []
    for number in range(0, len(questions), max(1, len(questions) // _SHOWN)):
        question = questions[number]
        rows = {column: row["generations"][number] for column, row in scores.items()}
        answers = {
            column: (question.spoken(row["response"]), row["stopped"])
            for column, row in rows.items()
        }
        prompt = " ".join(f"{m.content} {m.input}" for m in question.conversation.messages[-1:])
        parts.append(answers_text(prompt, question.spoken(question.reference), answers))
    *_, tuned = scores.values()
    answered = f"; {len(questions):,} questions answered" if questions else ""
    measured_on = (
        f"over {tuned['examples']:,} examples with {tuned['eval_tokens_trained']:,} tokens of "
        f"answers{answered}\nmodel: {model}"
    )
    return "\n\n".join([*parts, scores_text(scores), measured_on])


def scores_text(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Write all that `evaluate --json` holds but the answers: a column per model, with intervals.

    >>> row = {"exact_match": 0.965, "intervals": {"exact_match": [0.9, 1.0]}}
    >>> print(scores_text({"model": row}))
                       model  95% interval
      exact match      96.5%  90.0 to 100.0%
    """
    *_, last = columns.values()
    parts = [_aligned(sheet) for sheet in sheets(columns)]
    if lines := judge_lines(last):
        parts.append("\n".join(f"  {_on_one_line(line)}" for line in lines))
    if "difference" in last:
        parts.append(f"  {LEGEND}")
    return "\n\n".join(parts)


def _aligned(sheet: Sheet) -> str:
    rows = [(sheet.caption, *sheet.header[1:]), *sheet.rows]
    cells = [[_on_one_line(cell) for cell in row] for row in rows]
    return aligned(cells, numbers=range(1, 1 + sheet.numbers))


def answers_text(question: str, expected: str, answers: Mapping[str, tuple[str, bool]]) -> str:
    """Write a question, the expected answer, and that of each model: name -> (answer, stopped).

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
