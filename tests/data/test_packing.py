"""Fixed rows: nothing lost, nothing shared, every example at home in one segment."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.data.packing import best_fit_decreasing, in_order, one_each, packed_batch, shuffled
from jaxtune.data.schema import Example


def bins(lengths: list[int], capacity: int) -> list[list[int]]:
    """The lengths in each bin, of `lengths` in any order."""
    descending = np.sort(np.array(lengths, np.int64))[::-1]
    ranks, starts = best_fit_decreasing(descending, capacity)
    return [descending[ranks[a:b]].tolist() for a, b in itertools.pairwise(starts)]


def plain_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """The definition, slowly: where the least room remains, the bin that got it first."""
    found: list[tuple[int, int, list[int]]] = []  # room, when it got that room, content
    made: list[list[int]] = []
    for time, length in enumerate(sorted(lengths, reverse=True)):
        fitting = [b for b in found if b[0] >= length]
        if fitting:
            chosen = min(fitting, key=lambda b: (b[0], b[1]))
            found.remove(chosen)
            room, _, content = chosen
        else:
            room, content = capacity, []
            made.append(content)
        content.append(length)
        found.append((room - length, time, content))
    return made


@pytest.mark.parametrize(
    ("lengths", "capacity", "expected"),
    [
        ([4, 2, 4, 1], 4, [[4], [4], [2, 1]]),  # trl tests/test_data_utils.py, after truncation
        ([2, 3, 1], 4, [[3, 1], [2]]),  # the same file, empty ones dropped
        ([5, 3, 2, 2], 6, [[5], [3, 2], [2]]),  # the docstring
        ([3, 2, 2, 3, 5], 5, [[5], [3, 2], [3, 2]]),
        ([], 4, []),
        ([4], 4, [[4]]),
    ],
)
def test_best_fit_cases(lengths: list[int], capacity: int, expected: list[list[int]]) -> None:
    assert bins(lengths, capacity) == expected


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
@settings(max_examples=150, deadline=None)
def test_best_fit_is_its_definition(lengths: list[int], capacity: int) -> None:
    found = bins(lengths, capacity)
    assert found == plain_best_fit(lengths, capacity)
    assert sorted(n for row in found for n in row) == sorted(lengths)
    assert all(0 < sum(row) <= capacity for row in found)


def test_too_long_for_a_row() -> None:
    with pytest.raises(ValueError, match=r"descending, in 1\.\.4"):
        best_fit_decreasing(np.array([5, 1]), 4)


def test_rows_fill_up() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 0.8, 20_000).astype(int), 3, 2048)
    starts = best_fit_decreasing(np.sort(lengths)[::-1], 2048).starts
    assert lengths.sum() / (2048 * (len(starts) - 1)) > 0.98


def contents(rows: object) -> list[tuple[int, ...]]:
    examples, starts = rows  # type: ignore[misc]
    return [tuple(examples[a:b].tolist()) for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize("packing", [True, False])
def test_epochs_hold_everything_once_in_other_orders(packing: bool) -> None:
    lengths = np.random.default_rng(1).integers(1, 30, 200)
    made = best_fit_decreasing(np.sort(lengths)[::-1], 64) if packing else one_each(200)
    epochs = [contents(shuffled(made, lengths, 7, epoch)) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(n for row in epoch for n in row) == list(range(200))
        assert all(lengths[list(row)].sum() <= 64 for row in epoch)
    assert len({len(epoch) for epoch in epochs}) == 1
    assert epochs[0] != epochs[1] != epochs[2]
    assert {frozenset(row) for row in epochs[0]} != {frozenset(row) for row in epochs[1]} or (
        not packing
    )
    assert contents(shuffled(made, lengths, 7, 1)) == epochs[1]
    assert contents(shuffled(made, lengths, 8, 1)) != epochs[1]


def test_order_is_the_same_on_every_machine() -> None:
    """Written down once: a change of this line changes what every resumed run sees."""
    rows = shuffled(one_each(8), np.full(8, 3), 42, 0)
    assert rows.examples.tolist() == ORDER_42


ORDER_42 = [7, 1, 5, 0, 6, 4, 3, 2]


def test_file_order() -> None:
    lengths = np.array([1, 5, 2, 4])
    assert contents(in_order(one_each(4), lengths)) == [(0,), (1,), (2,), (3,)]
    made = best_fit_decreasing(np.sort(lengths)[::-1], 6)
    assert contents(in_order(made, lengths)) == [(1, 0), (3, 2)]


def example(ids: list[int]) -> Example:
    """All trained; the shift done."""
    n = len(ids) - 1
    return Example(
        np.array(ids[:-1], np.int32), np.array(ids[1:], np.int32), np.ones(n, np.float32)
    )


def test_packed_labels_and_positions_of_a_public_suite() -> None:
    """trl TestDataCollatorForLanguageModeling::test_packing: [1..6] as 3 + 3, [7..11] as 4 + 1.

    There labels are -100 where a segment begins; here the shift leaves that place out, so a segment
    of n tokens has n - 1 targets and one of a single token has none.
    """
    documents = [[1, 2, 3], [4, 5, 6], [7, 8, 9, 10]]
    batch = packed_batch([[0, 1], [2]], lambda i: example(documents[i]), 5)
    assert batch.inputs.tolist() == [[1, 2, 4, 5, 0], [7, 8, 9, 0, 0]]
    assert batch.targets.tolist() == [[2, 3, 5, 6, 0], [8, 9, 10, 0, 0]]
    assert batch.weights.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 2, 2, 0], [1, 1, 1, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 0, 1, 0], [0, 1, 2, 0, 0]]
    assert batch.weights.sum() == sum(len(d) - 1 for d in documents)  # P12


@given(st.lists(st.lists(st.integers(1, 99), min_size=2, max_size=9), min_size=1, max_size=12))
@settings(max_examples=80, deadline=None)
def test_no_segment_predicts_its_neighbour(documents: list[list[int]]) -> None:
    lengths = np.array([len(d) - 1 for d in documents])
    made = best_fit_decreasing(np.sort(lengths)[::-1], 10)
    rows = contents(shuffled(made, lengths, 0, 0))
    batch = packed_batch([list(row) for row in rows], lambda i: example(documents[i]), 10)
    assert batch.weights.sum() == lengths.sum()
    seen = []
    for row in range(len(rows)):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            here = batch.segment_ids[row] == segment
            ids = [*batch.inputs[row][here].tolist(), int(batch.targets[row][here][-1])]
            assert batch.targets[row][here].tolist() == ids[1:]
            assert batch.positions[row][here].tolist() == list(range(here.sum()))
            seen.append(ids)
        assert not batch.weights[row][batch.segment_ids[row] == 0].any()
    assert sorted(seen) == sorted(documents)
