"""Intervals of a score, and of the difference of two models: the paired bootstrap over examples.

The examples are drawn again, with replacement, as many as there are; the score of each resample is
taken; the interval is between two quantiles of those. Both models are scored on the same resamples,
so what makes an example hard for both cancels in their difference (Koehn, 2004).

Quantiles of a bootstrap are too narrow for few examples. They are widened to what Student's t asks
for (Hesterberg, 2015, "What teachers should know about the bootstrap", section 4.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from jaxtune.evaluation.scores.score import Distinct, Floats, Measure, Score, Scores

# With five pairs that differ, all in one direction, the exact test of signs is at 2 / 2**5 = 6%.
FEWEST_PAIRS = 6
_DRAWS = 2**22  # numbers drawn at a time: 32 MiB


class Bootstrap(NamedTuple):
    """A choice of how intervals are made; `level` is the share of intervals that hold the truth."""

    resamples: int = 2000
    level: float = 0.95
    seed: int = 0


class Interval(NamedTuple):
    low: float
    high: float


class Difference(NamedTuple):
    """A difference, tuned minus base.

    `clear`: the interval excludes 0, and at least `FEWEST_PAIRS` examples differ; then, and only
    then, it is called a difference.
    """

    value: float
    interval: Interval | None
    clear: bool


def intervals(scores: Scores, how: Bootstrap) -> dict[str, Interval | None]:
    """Compute intervals; None for fewer than two examples, and where a score is not finite."""
    drawn = _drawn({name: s for name, s in scores.items() if isinstance(s, Measure)}, how)
    return {name: _interval(score, drawn.get(name), how) for name, score in scores.items()}


def differences(base: Scores, tuned: Scores, how: Bootstrap) -> dict[str, Difference]:
    """Compare the scores that both have, over the same examples in the same order."""
    both = [name for name in tuned if name in base]
    # One seed and one number of examples: the same resamples on both sides.
    drawn_base, drawn_tuned = (
        _drawn({name: s for name in both if isinstance(s := side[name], Measure)}, how)
        for side in (base, tuned)
    )
    changes = {}
    for name in both:
        before, after = base[name], tuned[name]
        value = after.point() - before.point()
        if isinstance(before, Distinct) and isinstance(after, Distinct):
            change = after.without_each() - before.without_each()
            interval = _jackknife(value, change, how)
            pairs = np.count_nonzero(change != value)
        else:
            assert isinstance(before, Measure)
            assert isinstance(after, Measure)
            if before.rate and after.rate and len(before.parts) > 1:
                interval = paired_shares(before.parts[:, 0], after.parts[:, 0], how.level)
            else:
                interval = _quantiles(drawn_tuned[name] - drawn_base[name], len(before.parts), how)
            pairs = np.count_nonzero((before.parts != after.parts).any(axis=1))
        excludes = interval is not None and not interval.low <= 0 <= interval.high
        changes[name] = Difference(value, interval, excludes and bool(pairs >= FEWEST_PAIRS))
    return changes


def wilson(hits: float, count: float, level: float) -> Interval:
    """Compute the interval of a share (Wilson, 1927).

    It holds also where all examples or none are in, of which every resample would be the same.
    Where some count half, as ties do, it is wider than it need be.
    """
    z = float(special.ndtri(0.5 + level / 2))
    share, more = hits / count, z * z / count
    middle = (share + more / 2) / (1 + more)
    half = z / (1 + more) * math.sqrt(share * (1 - share) / count + more / (4 * count))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def paired_shares(before: Floats, after: Floats, level: float) -> Interval:
    """Compute the interval of the difference of two shares of the same examples, each 0 or 1
    (Agresti and Min, 2005).

    Half an example more is in each of the four cells. A bootstrap of 20 examples of which 4
    changed is too sure, and of examples that all changed it knows no doubt at all.
    """
    count = len(before) + 2
    up = float((after > before).sum()) + 0.5
    down = float((after < before).sum()) + 0.5
    middle = (up - down) / count
    half = float(special.ndtri(0.5 + level / 2)) * math.sqrt(up + down - count * middle**2) / count
    return Interval(max(-1.0, middle - half), min(1.0, middle + half))


def _interval(score: Score, drawn: Floats | None, how: Bootstrap) -> Interval | None:
    if isinstance(score, Distinct):
        interval = _jackknife(score.point(), score.without_each(), how)
        return interval and Interval(max(0.0, interval.low), min(1.0, interval.high))
    hits, count = score.parts.sum(axis=0)[:2]
    if score.rate and count > 1:
        return wilson(float(hits), float(count), how.level)
    assert drawn is not None
    return _quantiles(drawn, len(score.parts), how)


def _drawn(measures: Mapping[str, Measure], how: Bootstrap) -> dict[str, Floats]:
    """Compute the value of each measure on every resample `[R]`, the same for all."""
    if not measures:
        return {}
    parts = np.concatenate([measure.parts for measure in measures.values()], axis=1)
    with np.errstate(invalid="ignore"):  # a loss may be infinite
        sums = np.concatenate([counts @ parts for counts in _counts(len(parts), how)])
    values, at = {}, 0
    for name, measure in measures.items():
        size = measure.parts.shape[1]
        values[name] = measure.value(sums[:, at : at + size])
        at += size
    return values


def _counts(n: int, how: Bootstrap) -> Iterator[Floats]:
    """Count how often each of n examples is in each resample: blocks `[r n]`, R rows in all."""
    rng = np.random.Generator(np.random.PCG64(how.seed))
    size = max(1, _DRAWS // n)
    for start in range(0, how.resamples, size):
        rows = min(size, how.resamples - start)
        drawn = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.reshape(-1), minlength=rows * n).reshape(rows, n).astype(float)


def _quantiles(drawn: Floats, n: int, how: Bootstrap) -> Interval | None:
    if n < 2 or not np.isfinite(drawn).all():
        return None
    t = special.stdtrit(n - 1, (1 - how.level) / 2)
    below = float(special.ndtr(t * math.sqrt(n / (n - 1))))
    low, high = np.quantile(drawn, [below, 1 - below])
    return Interval(float(low), float(high))


def _jackknife(value: float, without_each: NDArray[np.float64], how: Bootstrap) -> Interval | None:
    """Take `value` more and less the error that leaving out one answer after the other shows."""
    n = len(without_each)
    if n < 2:
        return None
    error = math.sqrt((n - 1) / n * float(((without_each - without_each.mean()) ** 2).sum()))
    reach = -float(special.stdtrit(n - 1, (1 - how.level) / 2)) * error
    return Interval(value - reach, value + reach)
