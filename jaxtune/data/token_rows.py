"""Rows that come as token ids: `input_ids` with `labels` or a mask, as other trainers store them.

Knows the conventions of Hugging Face (labels are unshifted, -100 carries no loss, `attention_mask`
0 is padding); knows no tokenizer and no template, so nothing of such a row can be proven.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxtune.data.schema import Dropped, WeightedTokens

IGNORED = -100  # in `labels`: no loss on this token
MASKS = ("loss_mask", "assistant_masks", "completion_mask")
# Positions of packed rows; an example of its own brings 0, 1, 2, ... or none.
OPTIONAL = ("labels", *MASKS, "attention_mask", "position_ids")


def token_row(fields: Mapping[str, Any]) -> WeightedTokens | Dropped:
    """Read ids and the weight of each as a target; of several masks the product counts.

    Without labels and masks every token is trained.
    """
    columns = {}
    for name in ("input_ids", *OPTIONAL):
        if fields.get(name) is None:
            continue
        whole = name not in MASKS
        values = _numbers(fields[name], whole=whole)
        if values is None:
            kind = "whole numbers" if whole else "numbers"
            return Dropped(f"{name} is not a list of {kind}", f"got {str(fields[name])[:60]}")
        columns[name] = values
    if "input_ids" not in columns:
        return Dropped("input_ids is not a list of whole numbers", "got null")
    ids = columns["input_ids"]
    if lengths := [f"{n} {len(v)}" for n, v in columns.items() if len(v) != len(ids)]:
        return Dropped("columns of tokens differ in length", f"input_ids {len(ids)}, {lengths[0]}")
    weights = np.ones(len(ids), np.float64)
    for name in MASKS:
        weights *= columns.get(name, 1)
    if (weights < 0).any():
        return Dropped("a mask holds a number below 0")
    if "labels" in columns:
        labels = columns["labels"]
        trained = labels != IGNORED
        if (labels[trained] != ids[trained]).any():
            return Dropped("labels are not those of input_ids", _otherwise(ids, labels))
        weights *= trained
    return _without_padding(ids, weights, columns)


def _without_padding(
    ids: NDArray[Any], weights: NDArray[Any], columns: Mapping[str, NDArray[Any]]
) -> WeightedTokens | Dropped:
    """Cut off what `attention_mask` hides, which may stand at either end."""
    seen = np.flatnonzero(columns.get("attention_mask", np.ones(len(ids))))
    start, end = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 0)
    if len(seen) != end - start:
        return Dropped("attention_mask hides tokens between others")
    positions = columns.get("position_ids", np.arange(len(ids)))[start:end]
    if len(seen) and (np.diff(positions) != 1).any():
        return Dropped(
            "several examples in one row", "position_ids start again; give each a row of its own"
        )
    weights = weights[start:end].astype(np.float32)
    weights[:1] = 0.0  # nothing predicts the first token
    if not weights.any():
        return Dropped("nothing to train", f"{len(weights)} token{'s' * (len(weights) != 1)}")
    return WeightedTokens(ids[start:end].astype(np.int32), weights)


def _numbers(value: Any, *, whole: bool) -> NDArray[Any] | None:
    """Return [n] numbers that int32 or float32 hold; None if it is anything else."""
    if not isinstance(value, list):
        return None
    try:
        numbers = np.asarray(value or np.zeros(0, int))
    except (ValueError, OverflowError):  # lists of different lengths
        return None
    fits = numbers.dtype.kind in ("biu" if whole else "biuf") and numbers.ndim == 1
    return numbers if fits and (np.abs(numbers) < 2**31).all() else None


def _otherwise(ids: NDArray[Any], labels: NDArray[Any]) -> str:
    """Tell how labels differ: mostly they were shifted already."""
    next_ones = labels[:-1]
    trained = next_ones != IGNORED
    if (next_ones[trained] == ids[1:][trained]).all():
        return "they are those of the next token; expected unshifted, as Hugging Face has them"
    at = int(np.flatnonzero((labels != ids) & (labels != IGNORED))[0])
    return f"token {at + 1} is {ids[at]}, its label {labels[at]}"
