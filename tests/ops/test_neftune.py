"""The noise against its definition: bound, mean, variance, and whose length it goes by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.ops import neftune
from jaxtune.ops.neftune import noise

WIDTH, ALPHA = 400, 5.0
# Two packed examples and padding; one whole row; one example of one token.
SEGMENTS = np.array([[1] * 40 + [2] * 10 + [0] * 14, [1] * 64, [1] + [0] * 63])
LENGTHS = [(0, 0, 40), (0, 40, 10), (1, 0, 64), (2, 0, 1)]  # row, begin, length


def uniform() -> jax.Array:
    return neftune.uniform(jax.random.bits(jax.random.key(0), (*SEGMENTS.shape, WIDTH), "uint32"))


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    return np.asarray(noise(uniform(), jnp.asarray(SEGMENTS), ALPHA))


def test_bits_become_numbers_within_one() -> None:
    """Of each of eight equal stretches an eighth, none outside, and the ends are reached."""
    ends = neftune.uniform(jnp.array([0, 2**31, 2**32 - 1], jnp.uint32))
    np.testing.assert_array_equal(ends, [-1, 0, 1 - 2.0**-23])
    counts, _ = np.histogram(np.asarray(uniform()), bins=8, range=(-1, 1))
    expected = counts.sum() / 8
    assert np.square(counts - expected).sum() / expected < 24.3  # 7 degrees: p = 0.001


@pytest.mark.parametrize(("row", "begin", "length"), LENGTHS)
def test_each_example_has_the_noise_of_its_own_length(
    drawn: np.ndarray, row: int, begin: int, length: int
) -> None:
    """Uniform within +-b has mean 0 and variance b^2 / 3: five standard errors of each."""
    part = drawn[row, begin : begin + length].ravel() / (ALPHA / np.sqrt(length * WIDTH))
    assert np.abs(part).max() <= 1.0 + 1e-6
    assert np.abs(part).max() > 1.0 - 5 / part.size
    assert abs(part.mean()) < 5 * np.sqrt(1 / 3 / part.size)
    assert abs(part.var() - 1 / 3) < 5 * np.sqrt(4 / 45 / part.size)


def test_padding_has_none_and_no_two_tokens_the_same(drawn: np.ndarray) -> None:
    assert (drawn[SEGMENTS == 0] == 0).all()
    tokens = drawn[SEGMENTS > 0]
    assert len(np.unique(tokens, axis=0)) == len(tokens)


def test_a_part_of_a_row_has_the_noise_it_has_in_the_whole(drawn: np.ndarray) -> None:
    whole, part = jnp.asarray(SEGMENTS), slice(30, 50)
    found = noise(uniform()[:, part], whole[:, part], ALPHA, row_segments=whole)
    np.testing.assert_allclose(found, drawn[:, part], rtol=1e-6)
