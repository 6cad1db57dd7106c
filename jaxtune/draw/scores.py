"""Scores and answers of one model or of two, side by side. Takes plain values only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.draw.terminal import printable

_LONGEST_LINE = 160

# key of `evaluate --json` -> (name, how it is written)
_ROWS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "eval_loss": ("loss", "{:.4f}".format),
    "eval_perplexity": ("perplexity", "{:.4g}".format),
    "eval_token_accuracy": ("token accuracy", "{:.1%}".format),
    "exact_match": ("exact match", "{:.1%}".format),
    "rougeL": ("ROUGE-L", "{:.3f}".format),
    "stop_rate": ("stop rate", "{:.1%}".format),
}


def scores_text(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """A column per model, a row per score that is there.

    >>> print(scores_text({"base": {"exact_match": 0.0}, "tuned": {"exact_match": 0.965}}))
                          base    tuned
      exact match         0.0%    96.5%
    """
    there = next(iter(columns.values()))
    lines = [("", *(printable(name) for name in columns))]
    lines += [
        (name, *(_written(write, scores[key]) for scores in columns.values()))
        for key, (name, write) in _ROWS.items()
        if key in there
    ]
    width = max(9, 2 + max(len(name) for name in columns))
    return "\n".join(
        f"  {name:15}" + "".join(cell.rjust(width) for cell in cells) for name, *cells in lines
    )


def _written(write: Callable[[Any], str], value: Any) -> str:
    return "not finite" if value is None else write(value)


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
