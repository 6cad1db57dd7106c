"""Examples -> fixed rows. Knows lengths and positions; knows no text, no file and no step.

Packing is best fit, longest first. Its result depends on the lengths alone, so the bins are found
once; an epoch only decides which of the examples of equal length lies where, and in which order the
rows come. Every epoch therefore has the same number of rows, and its plan costs one permutation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxtune.data.schema import Batch, Example

Indices = NDArray[np.int64]


class Bins(NamedTuple):
    """A packing: row r holds the examples `ranks[starts[r]:starts[r + 1]]`, longest first."""

    ranks: Indices  # [number of examples]
    starts: Indices  # [number of rows + 1]


class PackedRows(NamedTuple):
    """A packing by number: row r holds the examples `examples[starts[r]:starts[r + 1]]`."""

    examples: Indices
    starts: Indices


def best_fit_decreasing(lengths: NDArray[np.integer], capacity: int) -> Bins:
    """Pack `lengths` (descending) into bins of at most `capacity` in sum.

    Every item goes where the least room remains; among equals to the bin that has waited longest.
    One big integer holds which amounts of room exist, so a search is a shift and a lowest bit.

        [5, 3, 2, 2], capacity 6   ->   [5] [3, 2] [2]      ranks 0 | 1 2 | 3
    """
    if len(lengths) and not 0 < lengths[-1] <= lengths[0] <= capacity:
        raise ValueError(f"lengths must be descending, in 1..{capacity}")
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]  # room -> bins, oldest first
    taken = [0] * (capacity + 1)  # how many of each list are gone; lists only grow
    rooms = 0  # bit r set: some bin has room r
    bin_of = np.empty(len(lengths), np.int64)
    count = 0
    for rank, length in enumerate(lengths.tolist()):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = waiting[room][taken[room]]
            taken[room] += 1
            if taken[room] == len(waiting[room]):
                waiting[room].clear()
                taken[room] = 0
                rooms ^= 1 << room
        else:
            room, chosen = capacity, count
            count += 1
        bin_of[rank] = chosen
        if room > length:
            waiting[room - length].append(chosen)
            rooms |= 1 << (room - length)
    starts = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(bin_of, minlength=count), out=starts[1:])
    return Bins(np.argsort(bin_of, kind="stable"), starts)


def one_each(count: int) -> Bins:
    """Put one example in each bin: no packing."""
    return Bins(np.arange(count), np.arange(count + 1))


def shuffled(bins: Bins, lengths: NDArray[np.integer], seed: int, epoch: int) -> PackedRows:
    """Order the rows of an epoch: a pure function of the lengths, `seed` and `epoch`.

    Examples are permuted before they are ranked by length, so those of one length change places
    from epoch to epoch; then the rows are permuted.
    """
    order = permutation(len(lengths), seed, epoch, 0)
    by_length = order[np.argsort(-lengths[order].astype(np.int64), kind="stable")]
    row_order = permutation(len(bins.starts) - 1, seed, epoch, 1)
    return _reordered(PackedRows(by_length[bins.ranks], bins.starts), row_order)


def permutation(count: int, *seeds: int) -> Indices:
    """Permute 0..count - 1 as `seeds` decide, the same on every machine and numpy version.

    Only the raw stream of a bit generator is promised to stay, so it is drawn and sorted.
    """
    keys = np.random.Philox(np.random.SeedSequence(seeds)).random_raw(count)
    return np.argsort(keys, kind="stable")


def in_order(bins: Bins, lengths: NDArray[np.integer]) -> PackedRows:
    """Order the rows by their first example, without any shuffling, for evaluation."""
    by_length = np.argsort(-lengths.astype(np.int64), kind="stable")
    examples = by_length[bins.ranks]
    if not len(examples):
        return PackedRows(examples, bins.starts)
    return _reordered(PackedRows(examples, bins.starts), np.argsort(examples[bins.starts[:-1]]))


def _reordered(rows: PackedRows, order: Indices) -> PackedRows:
    sizes = np.diff(rows.starts)[order]
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    offsets = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
    return PackedRows(rows.examples[np.repeat(rows.starts[:-1][order], sizes) + offsets], starts)


def packed_batch(
    rows: Sequence[Sequence[int]], example: Callable[[int], Example], length: int
) -> Batch:
    """Make the batch [B length] of the examples in each row, in order; a row may be empty.

    row (A, B), inputs A = [5 6], B = [7], length 4
    inputs       5 6 7 0
    segment_ids  1 1 2 0
    positions    0 1 0 0
    """
    shape = (len(rows), length)
    batch = Batch(
        inputs=np.zeros(shape, np.int32),
        targets=np.zeros(shape, np.int32),
        weights=np.zeros(shape, np.float32),
        segment_ids=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
    )
    for index, row in enumerate(rows):
        at = 0
        for segment, number in enumerate(row, 1):
            inputs, targets, weights = example(number)
            here = slice(at, at + len(inputs))
            batch.inputs[index, here] = inputs
            batch.targets[index, here] = targets
            batch.weights[index, here] = weights
            batch.segment_ids[index, here] = segment
            batch.positions[index, here] = np.arange(len(inputs))
            at = here.stop
    return batch
