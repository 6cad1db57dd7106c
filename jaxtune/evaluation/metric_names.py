"""The scores of `evaluate --json` by name: their titles, formats, and which way is up.

The terminal, the page and the model card share this table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """A name and format; `better` is 1 where more is better, -1 where less is, 0 where that
    depends."""

    name: str
    how: str  # a format, in which % makes a share a percentage
    better: int = 0


METRICS: Mapping[str, Metric] = {
    "eval_loss": Metric("loss", ".4f", -1),
    "eval_perplexity": Metric("perplexity", ".4g", -1),
    "eval_token_accuracy": Metric("token accuracy", ".1%", 1),
    "exact_match": Metric("exact match", ".1%", 1),
    "label_accuracy": Metric("label accuracy", ".1%", 1),
    "contains": Metric("contains", ".1%", 1),
    "rougeL": Metric("ROUGE-L", ".3f", 1),
    "chrf": Metric("chrF", ".1f", 1),
    "bleu": Metric("BLEU", ".1f", 1),
    "win_rate": Metric("win rate", ".1%", 1),
    "stop_rate": Metric("stop rate", ".1%", 1),
    "answer_tokens": Metric("answer tokens", ".1f"),
    "length_ratio": Metric("length ratio", ".2f"),
    "refusal_rate": Metric("refusals", ".1%"),
    "distinct_1": Metric("distinct-1", ".3f"),
    "distinct_2": Metric("distinct-2", ".3f"),
    "repetition": Metric("repetition", ".1%", -1),
    "eval_tokens_trained": Metric("tokens of answers", ","),
    "examples": Metric("examples", ","),
    "questions": Metric("questions", ","),
}


def metric(key: str) -> Metric:
    """Look a metric up; numbers that this version does not know follow under their own names."""
    return METRICS.get(key, Metric(key.replace("_", " "), ".4g"))


def written(value: Any, how: str) -> str:
    """Format a number: "not finite" for null, NaN and infinity; nothing for text."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "not finite"
    return format(value, how) if isinstance(value, int | float) else ""


def change(value: float, how: str) -> str:
    """Format a change with its sign; of percentages in points. A change too small to show has no
    sign."""
    points = " points" if how.endswith("%") else ""
    return f"{_signed(value, how)}{points}"


def _signed(value: float, how: str) -> str:
    text = f"{100 * value:+.1f}" if how.endswith("%") else format(value, f"+{how}")
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "\u2212")


def between(ends: Any, how: str, *, signed: bool = False) -> str:
    """Format `[low, high]`; nothing where there is no interval."""
    if not is_interval(ends):
        return ""
    if signed:
        return f"{_signed(ends[0], how)} to {_signed(ends[1], how)}"
    low, high = (written(end, how) for end in ends)
    return f"{low.removesuffix('%')} to {high}"


def verdict(key: str, difference: Any) -> str:
    """Name a difference: nothing, unless it is more than chance."""
    if not is_difference(difference) or not difference.get("clear"):
        return ""
    up = metric(key).better * (1 if difference["value"] > 0 else -1)
    return {1: "better", -1: "worse"}.get(up, "more" if difference["value"] > 0 else "less")


def is_difference(value: Any) -> bool:
    return isinstance(value, Mapping) and is_number(value.get("value"))


def is_interval(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(is_number, value))


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number; a truth value is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
