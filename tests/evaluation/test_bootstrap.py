"""Intervals hold the truth as often as they say, and pairing is what finds a small difference."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from jaxtune.evaluation.scores import score as measure
from jaxtune.evaluation.scores.bootstrap import Bootstrap, Interval, differences, intervals, wilson

HOW = Bootstrap(resamples=400)


def coverage(truth: float, found: list[Interval | None]) -> float:
    assert all(found)
    return float(np.mean([i.low <= truth <= i.high for i in found if i]))


def test_a_weighted_mean_is_covered_in_95_of_100() -> None:
    """A ratio of sums, skewed: the loss of a token goes with the length. 3,000 repeats gave 93.4%
    for 40 examples and 94.0% for 150; 600 have a standard error of 1 point."""
    rng = np.random.default_rng(0)
    lengths = np.arange(1, 40)
    factor = 1 + 0.3 * (lengths > 20)
    truth = float((lengths * factor).sum() / lengths.sum())  # gamma(4, 1/4) has mean 1
    for n in (40, 150):
        found = []
        for _ in range(600):
            drawn = rng.integers(0, len(lengths), n)
            loss = (lengths * factor)[drawn] * rng.gamma(4, 0.25, n)
            found.append(intervals({"x": measure.ratio(loss, lengths[drawn])}, HOW)["x"])
        assert 0.915 <= coverage(truth, found) <= 0.97, n


def test_a_difference_is_covered_and_seldom_called_where_there_is_none() -> None:
    rng = np.random.default_rng(1)
    for shift in (0.0, 0.3):
        found, clear = [], 0
        for _ in range(500):
            hard = rng.normal(0, 3, 25)
            base, tuned = hard + rng.normal(0, 0.5, 25), hard + shift + rng.normal(0, 0.5, 25)
            made = differences({"x": measure.mean(base)}, {"x": measure.mean(tuned)}, HOW)["x"]
            found.append(made.interval)
            clear += made.clear
        assert 0.92 <= coverage(shift, found) <= 0.98
        if shift == 0:
            assert clear / 500 <= 0.08
        else:
            assert clear / 500 >= 0.4  # t is about 2.1


def test_pairing_matters() -> None:
    """The same scores, once against their own questions and once against others'."""
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 3, 100)
    base, tuned = (
        {"x": measure.mean(hard)},
        {"x": measure.mean(hard + 0.2 + rng.normal(0, 0.1, 100))},
    )
    paired = differences(base, tuned, HOW)["x"]
    others = differences(base, measure.take(tuned, rng.permutation(100)), HOW)["x"]
    assert paired.value == pytest.approx(others.value)
    assert paired.interval
    assert others.interval
    assert paired.clear
    assert not others.clear
    wide = others.interval.high - others.interval.low
    assert paired.interval.high - paired.interval.low < wide / 20


def test_a_mean_has_the_interval_of_students_t() -> None:
    values = np.random.default_rng(4).normal(size=30)
    found = intervals({"x": measure.mean(values)}, Bootstrap(resamples=20_000))["x"]
    closed = stats.t.interval(0.95, 29, values.mean(), values.std(ddof=1) / np.sqrt(30))
    assert found == pytest.approx(closed, abs=0.02)


@pytest.mark.parametrize(("hits", "count"), [(0, 20), (3, 20), (20, 20), (199, 200)])
def test_a_share_has_wilsons_interval(hits: int, count: int) -> None:
    theirs = stats.binomtest(hits, count).proportion_ci(0.95, "wilson")
    assert wilson(hits, count, 0.95) == pytest.approx(theirs, abs=1e-12)
    score = measure.rate([i < hits for i in range(count)])
    assert intervals({"x": score}, HOW)["x"] == pytest.approx(theirs, abs=1e-12)


def test_a_difference_of_shares_by_hand() -> None:
    """20 examples, 6 become right and 1 wrong: 6.5 and 1.5 of 22."""
    base, tuned = np.array([0] * 6 + [1] * 14), np.array([1] * 6 + [0] + [1] * 13)
    found = differences({"x": measure.rate(base)}, {"x": measure.rate(tuned)}, HOW)["x"]
    half = 1.959964 * np.sqrt(8 / 22 - (5 / 22) ** 2) / np.sqrt(22)
    assert found.value == pytest.approx(5 / 20)
    assert found.interval == pytest.approx((5 / 22 - half, 5 / 22 + half), abs=1e-6)
    all_of_them = {"x": measure.rate(np.ones(50))}
    found = differences({"x": measure.rate(np.zeros(50))}, all_of_them, HOW)["x"]
    assert found.interval
    assert 0.85 < found.interval.low < 0.95
    assert found.interval.high == 1.0


@pytest.mark.parametrize(("up", "down"), [(0.05, 0.0), (0.3, 0.1), (0.1, 0.1), (0.9, 0.0)])
def test_a_difference_of_shares_is_covered(up: float, down: float) -> None:
    rng = np.random.default_rng(8)
    found = []
    for _ in range(600):
        change = rng.choice([1, -1, 0], 30, p=[up, down, 1 - up - down])
        base = np.where(change == 0, rng.integers(0, 2, 30), change < 0)
        pair = {"x": measure.rate(base)}, {"x": measure.rate(base + change)}
        found.append(differences(*pair, HOW)["x"].interval)
    assert coverage(up - down, found) >= 0.92


@pytest.mark.parametrize("n", [1, 2])
def test_distinct_is_as_sure_as_its_jackknife(n: int) -> None:
    """500 corpora of 40 answers: the interval around one holds their mean in most cases, and the
    shuffled words of one corpus are no difference."""
    rng = np.random.default_rng(6)

    def corpus() -> list[list[int]]:
        return [rng.zipf(1.6, rng.integers(3, 15)).clip(max=400).tolist() for _ in range(40)]

    made = [measure.distinct(corpus(), n) for _ in range(500)]
    truth = float(np.mean([score.point() for score in made]))
    found = [intervals({"x": score}, HOW)["x"] for score in made]
    assert 0.93 <= coverage(truth, found) <= 0.995
    pairs = zip(made[::2], made[1::2], strict=True)
    clear = [differences({"x": a}, {"x": b}, HOW)["x"].clear for a, b in pairs]
    assert np.mean(clear) <= 0.07


def test_few_examples_are_no_proof() -> None:
    def five_of(n: int, right: int) -> bool:
        base, tuned = measure.rate([False] * n), measure.rate([i < right for i in range(n)])
        return differences({"x": base}, {"x": tuned}, HOW)["x"].clear

    assert not five_of(5, 5)
    assert five_of(6, 6)
    assert not five_of(20, 5)  # the exact test of signs: 2 / 2**5 = 6%
    assert five_of(20, 6)
    one = {"x": measure.mean([1.0])}
    assert intervals(one, HOW) == {"x": None}
    assert intervals({"x": measure.rate([True])}, HOW) == {"x": None}
    assert differences(one, {"x": measure.mean([2.0])}, HOW)["x"] == (1.0, None, False)


def test_the_same_seed_the_same_interval_and_blocks_do_not_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = {"x": measure.mean(np.arange(10.0) ** 2), "y": measure.mean(np.arange(10.0))}
    whole = intervals(values, HOW)
    assert intervals({"y": values["y"]}, HOW)["y"] == whole["y"]
    assert intervals(values, HOW._replace(seed=1)) != whole
    monkeypatch.setattr("jaxtune.evaluation.scores.bootstrap._DRAWS", 37)
    assert intervals(values, HOW) == whole


def test_what_is_not_finite_has_no_interval() -> None:
    bad = {"x": measure.ratio([np.inf, 1.0], [1.0, 1.0])}
    assert intervals(bad, HOW) == {"x": None}
    assert not differences(bad, {"x": measure.mean([1.0, 1.0])}, HOW)["x"].clear


def test_wider_for_more_confidence() -> None:
    values = {"x": measure.mean(np.random.default_rng(0).normal(size=50))}
    narrow, wide = (intervals(values, HOW._replace(level=level))["x"] for level in (0.5, 0.99))
    assert narrow
    assert wide
    assert wide.low < narrow.low < narrow.high < wide.high
