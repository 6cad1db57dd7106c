"""A score that can be taken of any group of examples, and of a resample of them.

    per example     parts [n k]            sum(w*ce), sum(w)       or hit, 1
    added up        sums  [.. k]           over the group, or over each of R resamples
    value(sums)     [..]                   their ratio

Sums and counts travel; the division comes last, so that a mean over tokens stays one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.integer]


class Measure(NamedTuple):
    """A score made of sums: `parts` are float64 `[n k]`.

    `rate`: parts are (what is in, what could be), from 0 to 1 in each example, and the value a
    share.
    """

    parts: Floats
    value: Callable[[Floats], Floats]  # [.. k] -> [..]
    rate: bool = False

    def take(self, chosen: Indices) -> Measure:
        return self._replace(parts=self.parts[chosen])

    def point(self) -> float:
        return float(self.value(self.parts.sum(axis=0)))


class Distinct(NamedTuple):
    """A count of distinct n-grams over all n-grams of a corpus of answers, distinct-n (Li et al.,
    2016).

    No sum over answers, so a resample, which repeats answers, does not say how sure it is.

    `grams` are numbers of n-grams, `owners` the answer of each, of so many `answers`.
    """

    grams: NDArray[np.int64]
    owners: NDArray[np.int64]
    answers: int

    def take(self, chosen: Indices) -> Distinct:
        new = np.full(self.answers, -1)
        new[chosen] = np.arange(len(chosen))
        selected = new[self.owners] >= 0
        return Distinct(self.grams[selected], new[self.owners[selected]], len(chosen))

    def point(self) -> float:
        return len(np.unique(self.grams)) / max(1, len(self.grams))

    def without_each(self) -> Floats:
        """Compute the value of the corpus without answer i `[n]`."""
        kinds, inverse = np.unique(self.grams, return_inverse=True)
        pairs = np.unique(np.stack([inverse, self.owners]), axis=1)  # each kind once an answer
        in_answers = np.bincount(pairs[0], minlength=len(kinds))
        only_here = np.bincount(pairs[1, in_answers[pairs[0]] == 1], minlength=self.answers)
        sizes = np.bincount(self.owners, minlength=self.answers)
        left = len(self.grams) - sizes
        return np.where(left > 0, (len(kinds) - only_here) / np.maximum(1, left), 0.0)


Score = Measure | Distinct
Scores = Mapping[str, Score]


def take(scores: Scores, chosen: Indices) -> dict[str, Score]:
    """Select the same scores of some of the examples."""
    return {name: score.take(chosen) for name, score in scores.items()}


def mean(values: Sequence[float] | Floats) -> Measure:
    values = np.asarray(values, np.float64)
    return ratio(values, np.ones(len(values)))


def rate(hits: Sequence[bool]) -> Measure:
    return mean(np.asarray(hits, np.float64))._replace(rate=True)


def ratio(above: Sequence[float] | Floats, below: Sequence[float] | Floats) -> Measure:
    """Make the measure sum(above) / sum(below); NaN where nothing is below."""
    parts = np.stack([np.asarray(above, np.float64), np.asarray(below, np.float64)], axis=1)
    return Measure(parts, _quotient)


def exp_of_ratio(above: Floats, below: Floats) -> Measure:
    return ratio(above, below)._replace(value=_exp_of_quotient)


def distinct(answers: Sequence[Sequence[Hashable]], n: int) -> Distinct:
    """Count the n-grams of token sequences; the value is 0 where no answer has n tokens."""
    numbers: dict[tuple[Hashable, ...], int] = {}
    grams = [
        (numbers.setdefault(gram, len(numbers)), owner)
        for owner, answer in enumerate(answers)
        for gram in zip(*(answer[i:] for i in range(n)), strict=False)
    ]
    pairs = np.array(grams, np.int64).reshape(-1, 2)
    return Distinct(pairs[:, 0], pairs[:, 1], len(answers))


def _quotient(sums: Floats) -> Floats:
    above, below = sums[..., 0], sums[..., 1]
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)


def _exp_of_quotient(sums: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return np.exp(_quotient(sums))
