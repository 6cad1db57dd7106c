"""Data progress: how much of its data a run has seen by a step, and which data that was.

Counts are pure functions of the step, so a resumed run knows them without having counted.
"""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxtune.data.dataset import Batches, Dataset


class Counts(NamedTuple):
    """A count of positions after the shift, without padding: `tokens` all, `trained` those with
    weight.
    """

    tokens: int = 0
    trained: int = 0
    examples: int = 0

    def plus(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


def counts_of(batches: Batches, step: int) -> Counts:
    """Count what the batch of one step holds."""
    numbers = np.array([n for row in batches.examples(step) for n in row], np.int64)
    return _counted(batches, numbers)


def _counted(batches: Batches, numbers: NDArray[np.int64]) -> Counts:
    data = batches.dataset
    return Counts(
        tokens=int((data.token_counts[numbers] - 1).sum()),
        trained=int(data.trained_counts[numbers].sum()),
        examples=len(numbers),
    )


def counts_before(batches: Batches, step: int) -> Counts:
    """Count what all steps before `step` held together."""
    epoch, index = batches.locate(step)
    seen = Counts()
    for earlier in range(epoch):
        seen = seen.plus(_counted(batches, batches.drawn(earlier)))
    for earlier in range(step - index, step):
        seen = seen.plus(counts_of(batches, earlier))
    return seen


def epoch_at(batches: Batches, step: int) -> float:
    """Return the epochs finished before `step`, with the fraction of the current one."""
    epoch, index = batches.locate(step)
    return epoch + index / (batches.end_of_epoch(epoch) - (step - index))


def fingerprint(batches: Batches) -> str:
    """Hash data, tokenizer, template, seed and rows: if equal, every step has the same batch."""
    parts = [batches.dataset.fingerprint, batches.seed, batches.batch_size, batches.row_length]
    parts += [batches.rows]  # packed or not
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def largest_id(dataset: Dataset) -> int:
    """Return the largest token id of all sources: the embedding needs a row for it."""
    return max(int(source.stored.arrays["ids"].max()) for source in dataset.sources)
