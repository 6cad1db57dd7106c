"""What is drawn: the processors of transformers, and chi-square against exact distributions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxtune.config import ConfigError
from jaxtune.inference.sampling import (
    GREEDY,
    LOWEST,
    Sampling,
    choose,
    process_logits,
    sampling_arrays,
)

V = 24
ROWS = 4096  # draws of one distribution, or any rows: one shape, one program
rng = np.random.default_rng(3)
LOGITS = rng.normal(size=V).astype(np.float32) * 2
# The largest two, and the two negative ones that are likeliest: a penalty moves all four.
RANKED = np.argsort(-LOGITS)
SEEN = np.isin(np.arange(V), [*RANKED[:2], *RANKED[LOGITS[RANKED] < 0][:2]])

KINDS = {
    "temperature": Sampling(0.7),
    "hot": Sampling(3.0),
    "top-k": Sampling(1.0, top_k=5),
    "top-k of more than there are": Sampling(1.0, top_k=V + 3),
    "top-p": Sampling(1.0, top_p=0.8),
    "top-p that only one reaches": Sampling(1.0, top_p=0.05),
    "penalty": Sampling(1.0, repetition_penalty=1.7),
    "reward": Sampling(1.0, repetition_penalty=0.6),
    "temperature, top-k": Sampling(1.8, top_k=7),
    "temperature, top-p": Sampling(1.8, top_p=0.6),
    "all": Sampling(1.4, top_k=9, top_p=0.75, repetition_penalty=1.3),
    "greedy with a penalty": Sampling(repetition_penalty=4.0),
}

_processed = jax.jit(process_logits)
_choose = jax.jit(choose)


def rows_of(*samplings: Sampling, numbers: Any = None) -> tuple[Any, ...]:
    """ROWS rows of LOGITS, SEEN and the settings, each of `samplings` in turn."""
    each = [samplings[i % len(samplings)] for i in range(ROWS)]
    numbers = np.arange(ROWS) if numbers is None else numbers
    logits_BV = np.broadcast_to(LOGITS, (ROWS, V))
    return logits_BV, np.broadcast_to(SEEN, (ROWS, V)), sampling_arrays(each, numbers)


def exact(sampling: Sampling) -> np.ndarray:
    """The distribution by its definition, in float64, with a sort; greedily, all on one token."""
    logits = LOGITS.astype(np.float64)
    punished = np.where(logits < 0, logits * sampling.repetition_penalty, logits)
    punished = np.where(logits > 0, punished / sampling.repetition_penalty, punished)
    logits = np.where(SEEN, punished, logits)
    if sampling.temperature == 0:
        return np.eye(V)[logits.argmax()]
    logits = logits / sampling.temperature
    order = np.argsort(-logits)
    kept = order[: sampling.top_k or V]
    shares = np.exp(logits[kept] - logits.max())
    shares /= shares.sum()
    reached = np.cumsum(shares) >= sampling.top_p - 1e-12
    kept = kept[: int(np.argmax(reached)) + 1 if reached.any() else V]
    found = np.zeros(V)
    found[kept] = np.exp(logits[kept] - logits.max())
    return found / found.sum()


def likelihood(draws: np.ndarray, shares: np.ndarray) -> float:
    """The p-value of chi-square; what is rare is one bin, what is impossible must not come."""
    counts = np.bincount(draws, minlength=V)
    assert counts[shares == 0].sum() == 0
    often = shares * len(draws) >= 8
    rare = (shares > 0) & ~often
    seen, due = list(counts[often]), list(shares[often] * len(draws))
    if shares[rare].sum() * len(draws) >= 8:
        seen.append(counts[rare].sum())
        due.append(shares[rare].sum() * len(draws))
    due = np.array(due) * sum(seen) / sum(due)
    return 1.0 if len(seen) < 2 else float(stats.chisquare(seen, due).pvalue)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_of_the_exact_distribution(kind: str) -> None:
    sampling = KINDS[kind]
    draws = np.asarray(_choose(*rows_of(sampling), jnp.zeros(ROWS, jnp.int32)))
    assert likelihood(draws, exact(sampling)) > 1e-3
    if sampling.temperature:  # and the test can tell: another one does not fit
        other = exact(Sampling(sampling.temperature * 1.25, sampling.top_k, sampling.top_p))
        if np.count_nonzero(exact(sampling)) > 1 and np.array_equal(other > 0, exact(sampling) > 0):
            assert likelihood(draws, other) < 1e-6


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    sampling = KINDS[kind]
    ids = torch.tensor(np.flatnonzero(SEEN))[None]
    scores = torch.tensor(LOGITS)[None]
    steps: list[Any] = [theirs.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    if sampling.temperature:
        steps.append(theirs.TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            steps.append(theirs.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            steps.append(theirs.TopPLogitsWarper(sampling.top_p))
    for step in steps:
        scores = step(ids, scores)
    ours = np.asarray(_processed(*rows_of(sampling)))[0]
    found = scores[0].numpy()
    np.testing.assert_array_equal(ours == LOWEST, np.isinf(found))
    np.testing.assert_allclose(ours[ours != LOWEST], found[np.isfinite(found)], rtol=1e-6)

    draws = np.asarray(_choose(*rows_of(sampling), jnp.zeros(ROWS, jnp.int32)))
    shares = torch.softmax(scores[0].double(), dim=-1).numpy()
    if sampling.temperature:
        assert likelihood(draws, shares) > 1e-3
    else:
        assert set(draws) == {int(shares.argmax())}


def test_equal_logits_at_the_cut_are_all_kept() -> None:
    """As transformers keeps them for top-k; which of them a sort would keep is chance."""
    logits_BV = np.full((ROWS, V), -3.0, np.float32)
    logits_BV[:, [3, 8, 9]] = 1.0
    _, seen, asked = rows_of(Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.5))
    kept = np.asarray(_processed(logits_BV, np.zeros_like(seen), asked))[:2] != LOWEST
    assert [np.flatnonzero(row).tolist() for row in kept] == [[3, 8, 9], [3, 8, 9]]


def test_rows_ask_for_different_things() -> None:
    """A row gets what it would get if all asked for the same."""
    kinds = [GREEDY, *KINDS.values()]
    places = jnp.zeros(ROWS, jnp.int32)
    mixed = np.asarray(_choose(*rows_of(*kinds), places))
    for i, sampling in enumerate(kinds):
        alone = np.asarray(_choose(*rows_of(sampling), places))
        np.testing.assert_array_equal(mixed[i :: len(kinds)], alone[i :: len(kinds)])


def test_greedy_is_the_first_of_the_likeliest() -> None:
    logits_BV = np.zeros((ROWS, V), np.float32)
    logits_BV[:, [4, 7]] = 1.0
    _, seen, asked = rows_of(GREEDY)
    assert set(np.asarray(_choose(logits_BV, seen, asked, jnp.zeros(ROWS, jnp.int32)))) == {4}


def test_random_numbers_follow_from_seed_number_and_place() -> None:
    at = jnp.arange(ROWS, dtype=jnp.int32)

    def draws(seed: int, numbers: np.ndarray, places: jax.Array) -> np.ndarray:
        return np.asarray(_choose(*rows_of(Sampling(1.0, seed=seed), numbers=numbers), places))

    numbers = np.arange(ROWS)
    first = draws(7, numbers, at)
    np.testing.assert_array_equal(first, draws(7, numbers, at))
    np.testing.assert_array_equal(first[::-1], draws(7, numbers[::-1].copy(), at[::-1]))
    changed = {
        "seed": draws(8, numbers, at),
        "high bits of the seed": draws(7 + 2**40, numbers, at),
        "number": draws(7, numbers + 1, at),
        "place": draws(7, numbers, at + 1),
    }
    # Two independent draws are the same with the chance that any two are.
    alike = float(np.sum(exact(Sampling(1.0)) ** 2))
    for found in changed.values():
        assert np.mean(found == first) == pytest.approx(alike, abs=0.05)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("temperature", -0.5, "0 (greedy), or at least 1e-06"),
        ("temperature", float("nan"), "0 (greedy), or at least 1e-06"),
        ("temperature", 1e-9, "0 (greedy), or at least 1e-06"),
        ("top_k", -1, "1 or more, or 0 for all tokens"),
        ("top_p", 0.0, "more than 0, at most 1"),
        ("top_p", 1.5, "more than 0, at most 1"),
        ("repetition_penalty", 0.0, "a positive number; 1 is none"),
        ("seed", -1, "0 up to 2^64 - 1"),
        ("seed", 2**64, "0 up to 2^64 - 1"),
    ],
)
def test_refusals(field: str, value: float, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        Sampling(**{field: value})
    assert str(error.value) == f"{field} is {value}; expected {expected}."
