"""The next token of each row from its logits: the likeliest, or a draw.

The logits go through transformers' logits processors, in their order: repetition penalty,
temperature, top-k, top-p. Settings are data, one of each per row, so that one program serves rows
with different settings. Row b's random numbers come from its seed, its prompt's
number and the token's place in the answer: from nothing that its neighbours could change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.config import ConfigError

LOWEST = float(np.finfo(np.float32).min)  # a logit that is never drawn
MOST_SEED = 2**64


def _check(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value}; expected {expected}.")


@dataclass(frozen=True)
class Sampling:
    """A way to draw one answer; the default is greedy.

    `temperature` divides the logits; 0 takes the likeliest token, `top_k` and `top_p` do nothing
    then. `top_k` keeps the k largest logits (and what equals the last of them), 0 all. `top_p`
    keeps the fewest tokens, likeliest first, whose probabilities reach p. `repetition_penalty`
    divides positive logits of tokens that prompt or answer already have, and multiplies negative
    ones (arXiv:1909.05858). `seed`: 0 up to 2^64 - 1. Raises: ConfigError.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        # Written so that NaN is refused, too. Logits divided by less would not be finite.
        warm = self.temperature == 0 or 1e-6 <= self.temperature < math.inf
        _check(warm, "temperature", self.temperature, "0 (greedy), or at least 1e-06")
        _check(0 <= self.top_k < 2**31, "top_k", self.top_k, "1 or more, or 0 for all tokens")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "more than 0, at most 1")
        _check(
            0 < self.repetition_penalty < math.inf,
            "repetition_penalty",
            self.repetition_penalty,
            "a positive number; 1 is none",
        )
        _check(0 <= self.seed < MOST_SEED, "seed", self.seed, "0 up to 2^64 - 1")


GREEDY = Sampling()


class SamplingArrays(NamedTuple):
    """The `Sampling` and the prompt number of each row as arrays `[B]`; seeds uint32 `[B 2]`."""

    temperature: Any
    top_k: Any
    top_p: Any
    repetition_penalty: Any
    seed: Any
    number: Any


def sampling_arrays(samplings: Sequence[Sampling], numbers: Sequence[int]) -> SamplingArrays:
    """Stack one row for each, numpy."""

    def column(name: str, dtype: Any) -> np.ndarray:
        return np.array([getattr(sampling, name) for sampling in samplings], dtype)

    halves = [(sampling.seed >> 32, sampling.seed & 0xFFFFFFFF) for sampling in samplings]
    return SamplingArrays(
        column("temperature", np.float32),
        column("top_k", np.int32),
        column("top_p", np.float32),
        column("repetition_penalty", np.float32),
        np.array(halves, np.uint32).reshape(-1, 2),
        np.array(numbers, np.int32),
    )


def choose(
    logits: jax.Array, seen: jax.Array, settings: SamplingArrays, places: jax.Array
) -> jax.Array:
    """Choose the next token of each row `[B]` int32, from logits `[B V]` in float32.

    `seen` `[B V]` are the tokens that a row already has; `places` `[B]` is how many tokens its
    answer has. Equal logits: greedily the lowest id. Rows that all are greedy cost an argmax.
    """

    def drawn() -> jax.Array:
        processed_BV = process_logits(logits, seen, settings)
        noise_BV = jax.vmap(_noise, in_axes=(0, 0, 0, None))(
            settings.seed, settings.number, places, logits.shape[-1]
        )
        # The largest of logits plus Gumbel noise is a draw from their softmax.
        noise_BV = jnp.where((settings.temperature > 0)[:, None], noise_BV, 0.0)
        return jnp.argmax(processed_BV + noise_BV, axis=-1)

    plain_B = (settings.temperature == 0) & (settings.repetition_penalty == 1)
    likeliest = lambda: jnp.argmax(logits, axis=-1)  # noqa: E731
    next_B: jax.Array = jax.lax.cond(jnp.all(plain_B), likeliest, drawn)
    return next_B.astype(jnp.int32)


def process_logits(logits: jax.Array, seen: jax.Array, settings: SamplingArrays) -> jax.Array:
    """Apply each row's settings to `logits` `[B V]`; tokens that cannot be drawn get LOWEST."""
    penalty_B1 = settings.repetition_penalty[:, None]
    punished_BV = jnp.where(logits < 0, logits * penalty_B1, logits / penalty_B1)
    logits = jnp.where(seen, punished_BV, logits)
    greedy_B1 = (settings.temperature == 0)[:, None]
    logits = logits / jnp.where(greedy_B1, 1.0, settings.temperature[:, None])

    def top_k(logits: jax.Array) -> jax.Array:
        all_B = settings.top_k == 0
        count_B = jnp.where(all_B, logits.shape[-1], settings.top_k).astype(jnp.float32)
        return _keep_largest(logits, jnp.ones_like(logits), count_B, all_B)

    def top_p(logits: jax.Array) -> jax.Array:
        shares_BV = jax.nn.softmax(logits, axis=-1)
        return _keep_largest(logits, shares_BV, settings.top_p, settings.top_p >= 1)

    # Each reads all logits 32 times: only if a row needs it.
    same = lambda logits: logits  # noqa: E731
    logits = jax.lax.cond(jnp.any(settings.top_k > 0), top_k, same, logits)
    logits = jax.lax.cond(jnp.any(settings.top_p < 1), top_p, same, logits)
    return logits


def _keep_largest(
    logits_BV: jax.Array, weights_BV: jax.Array, enough_B: jax.Array, all_B: jax.Array
) -> jax.Array:
    """Keep the largest logits, as few as have weights that sum to `enough`, and ties.

    All are kept if the weights never sum up to that. The threshold is found bit by bit from above,
    which needs no sorting.
    """
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.uint32)
    negative_BV = bits_BV >> 31 == 1
    # Unsigned integers in the order of the numbers.
    order_BV = jnp.where(negative_BV, ~bits_BV, bits_BV | jnp.uint32(1 << 31))

    def lower(i: jax.Array, threshold_B: jax.Array) -> jax.Array:
        higher_B = threshold_B | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        above_BV = order_BV >= higher_B[:, None]
        reached_B = jnp.sum(jnp.where(above_BV, weights_BV, 0.0), axis=-1) >= enough_B
        return jnp.where(reached_B, higher_B, threshold_B)

    threshold_B = jnp.zeros(logits_BV.shape[0], jnp.uint32)
    threshold_B = jax.lax.fori_loop(0, 32, lower, threshold_B)
    processed_BV = (order_BV >= threshold_B[:, None]) | all_B[:, None]
    return jnp.where(processed_BV, logits_BV, LOWEST)


def _noise(seed_2: jax.Array, number: jax.Array, place: jax.Array, vocab: int) -> jax.Array:
    key = jax.random.wrap_key_data(seed_2, impl="threefry2x32")
    key = jax.random.fold_in(jax.random.fold_in(key, number), place)
    return jax.random.gumbel(key, (vocab,), jnp.float32)
