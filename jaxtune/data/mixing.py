"""Mixtures: which examples make up an epoch, if datasets have weights or target proportions.

    weight       an example of a dataset with weight 2 is drawn twice as often as one with weight 1
    proportions  within a dataset, the examples of each value of a column get their target share

An epoch is as long as all examples together that may be drawn. What is rare is repeated and what is
common is thinned out, both evenly: a stratum (examples that are drawn alike) is gone through in a
new order again and again, and every epoch takes the next ones from where the last one stopped. So
after any number of epochs no example of a stratum was seen more than once more often than another,
nothing is left out for good, and an epoch is a function of the strata, seed and epoch alone. With
equal weights and no proportions every example is in every epoch once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxtune.config import ConfigError, DataError, nearest
from jaxtune.data.packing import Indices, permutation

OTHER = "(in no target)"


class MixedDataset(NamedTuple):
    """A dataset's side of a mixture."""

    name: str
    path: str
    weight: float
    column: str | None  # None = drawn as it comes
    target: Mapping[str, float]  # value of the column -> share
    numbers: Indices  # of its examples
    values: NDArray[np.int32]  # of its examples, as indices into `known`
    known: Sequence[str]


class Stratum(NamedTuple):
    """A set of examples that are drawn alike: those of a dataset, or of one value of its column."""

    dataset: str
    value: str | None
    numbers: Indices
    drawn: int  # in each epoch; 0 = what is in no target


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Share out `total` in whole numbers by `shares`, each less than 1 off (largest remainders
    first).

    >>> apportion(10, [0.8, 0.15, 0.05])
    [8, 2, 0]
    """
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def strata(parts: Sequence[MixedDataset]) -> tuple[Stratum, ...]:
    """List the strata of a mixture. Raises `DataError` for a target that no example meets."""
    parts = [part for part in parts if len(part.numbers)]
    split = [_by_value(part) for part in parts]
    usable = [sum(len(numbers) for numbers in groups.values()) for groups in split]
    shares = [part.weight * count for part, count in zip(parts, usable, strict=True)]
    drawn = apportion(sum(usable), shares) if parts else []
    found: list[Stratum] = []
    for part, groups, own, count in zip(parts, split, usable, drawn, strict=True):
        within = [part.target[value] for value in groups] if part.column else [1.0]
        counts = apportion(count, within)
        for (value, numbers), amount in zip(groups.items(), counts, strict=True):
            if not amount:
                raise ConfigError(
                    f"{part.path}: its weight or proportions leave none of the {len(numbers)} "
                    f"examples{f' of {value}' if part.column else ''} in an epoch of "
                    f"{sum(usable)}. Raise them, or take these examples out."
                )
            found.append(Stratum(part.name, value if part.column else None, numbers, amount))
        if own < len(part.numbers):
            left = np.setdiff1d(part.numbers, np.concatenate(list(groups.values())))
            found.append(Stratum(part.name, OTHER, left, 0))
    return tuple(found)


def _by_value(part: MixedDataset) -> dict[str, Indices]:
    """Group the examples by each value in the target; all of them if the part has none."""
    if part.column is None:
        return {"": part.numbers}
    groups: dict[str, Indices] = {}
    for value in part.target:
        code = part.known.index(value) if value in part.known else -1
        groups[value] = part.numbers[part.values == code]
        if not len(groups[value]):
            raise DataError(
                f"{part.path}: proportions: no example has '{value}' in its column "
                f"'{part.column}'.{nearest(value, list(part.known))} There are: "
                f"{', '.join(sorted(part.known)[:10])}."
            )
    return groups


def draw(mixed: Sequence[Stratum], seed: int, epoch: int) -> Indices:
    """Number an epoch's examples; one that is repeated comes several times."""
    drawn = []
    for index, stratum in enumerate(mixed):
        size, first = len(stratum.numbers), epoch * stratum.drawn
        passes = range(first // size, -(-(first + stratum.drawn) // size))
        orders = [permutation(size, seed, index, number, 2) for number in passes]
        if orders:
            start = first - passes.start * size
            drawn.append(stratum.numbers[np.concatenate(orders)[start : start + stratum.drawn]])
    return np.concatenate(drawn)


def table(mixed: Sequence[Stratum]) -> list[dict[str, Any]]:
    """Tabulate each stratum's share of the examples, and of an epoch."""
    examples = sum(len(stratum.numbers) for stratum in mixed)
    drawn = sum(stratum.drawn for stratum in mixed)
    return [
        {
            "dataset": stratum.dataset,
            "value": stratum.value,
            "examples": len(stratum.numbers),
            "share_before": len(stratum.numbers) / examples,
            "per_epoch": stratum.drawn,
            "share_after": stratum.drawn / drawn,
        }
        for stratum in mixed
    ]
