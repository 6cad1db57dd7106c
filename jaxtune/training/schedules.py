"""Learning rate by step, with Hugging Face's meaning: pure functions, nothing to save or resume.

Every schedule rises as `learning_rate * step / warmup_steps` first, so the first step of a warmup
has learning rate 0; `constant` alone has no warmup. What follows is a share of the peak:

    linear                 1 -> 0 at the last step
    cosine                 half a wave from 1 to 0          num_cycles (0.5)
    cosine_with_restarts   such half waves in a row         num_cycles (1)
    cosine_with_min_lr     half a wave from 1 to the floor  min_lr or min_lr_rate, num_cycles (0.5)
    polynomial             (1 - progress) ** power          lr_end (1e-7), power (1)
    inverse_sqrt           1 / sqrt(step / timescale)       timescale (warmup_steps, else 10,000)
    warmup_stable_decay    1, then a decay at the end       num_decay_steps, num_stable_steps,
                                                            decay_type, warmup_type, min_lr_ratio
    constant, constant_with_warmup

Source: the lambdas of transformers' `optimization.py`, against which the tests compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.config import ConfigError

Schedule = Callable[[jax.Array], jax.Array]
Share = Callable[[jax.Array], jax.Array]  # step, f32 -> share of the peak


def warmup_length(warmup_steps: float, total_steps: int) -> int:
    """Hugging Face 5's meaning: below 1 a share of all steps (rounded up), else a number."""
    return math.ceil(total_steps * warmup_steps) if warmup_steps < 1 else round(warmup_steps)


def schedule(
    kind: str, *, learning_rate: float, warmup_steps: int, total_steps: int, **options: Any
) -> Schedule:
    """step (0 for the first update) -> learning rate, f32.

    `options` are those of the kind, under their Hugging Face names; None is the same as absent.
    After the last step a decaying schedule stays where it ended.
    """
    if kind not in AFTER_WARMUP:
        raise ValueError(f"lr_scheduler_type '{kind}'; there are: {', '.join(AFTER_WARMUP)}")
    chosen = {name: value for name, value in options.items() if value is not None}
    warmup = 0 if kind == "constant" else warmup_steps
    rise = WAVES[chosen.pop("warmup_type", "linear")]
    floor = chosen.get("min_lr_ratio", 0.0)  # of both ends of warmup_stable_decay
    share = AFTER_WARMUP[kind](learning_rate, warmup, total_steps, **chosen)

    def at(step: jax.Array) -> jax.Array:
        now = jnp.asarray(step, jnp.float32)
        rising = floor + (1.0 - floor) * rise(1.0 - jnp.minimum(now / max(warmup, 1), 1.0))
        return learning_rate * jnp.where(now < warmup, rising, share(jnp.maximum(now, warmup)))

    return at


# Progress 0 .. 1 -> 1 .. 0. A rise is a fall looked at from its end.
WAVES: Mapping[str, Share] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
    "1-sqrt": lambda progress: 1.0 - jnp.sqrt(progress),
}


def _progress(warmup: int, total: int) -> Share:
    """0 when the warmup ends, 1 at the last step."""
    return lambda now: jnp.clip((now - warmup) / max(total - warmup, 1), 0.0, 1.0)


def _constant(peak: float, warmup: int, total: int) -> Share:
    return jnp.ones_like


def _linear(peak: float, warmup: int, total: int) -> Share:
    progress = _progress(warmup, total)
    return lambda now: 1.0 - progress(now)


def _cosine(
    peak: float, warmup: int, total: int, *, num_cycles: float = 0.5, floor: float = 0.0
) -> Share:
    progress = _progress(warmup, total)

    def share(now: jax.Array) -> jax.Array:
        wave = 0.5 * (1.0 + jnp.cos(2.0 * jnp.pi * num_cycles * progress(now)))
        return floor + (1.0 - floor) * wave

    return share


def _cosine_with_min_lr(
    peak: float,
    warmup: int,
    total: int,
    *,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    num_cycles: float = 0.5,
) -> Share:
    if (min_lr is None) == (min_lr_rate is None):
        raise ValueError("cosine_with_min_lr takes one of min_lr and min_lr_rate")
    floor = min_lr_rate if min_lr is None else min_lr / peak if peak else 0.0
    assert floor is not None
    return _cosine(peak, warmup, total, num_cycles=num_cycles, floor=floor)


def _cosine_with_restarts(
    peak: float, warmup: int, total: int, *, num_cycles: float = 1.0
) -> Share:
    progress = _progress(warmup, total)

    def share(now: jax.Array) -> jax.Array:
        done = progress(now)
        wave = 0.5 * (1.0 + jnp.cos(jnp.pi * ((num_cycles * done) % 1.0)))
        return jnp.where(done < 1.0, wave, 0.0)

    return share


def _polynomial(
    peak: float, warmup: int, total: int, *, lr_end: float = 1e-7, power: float = 1.0
) -> Share:
    progress = _progress(warmup, total)
    floor = lr_end / peak if peak else 0.0
    return lambda now: floor + (1.0 - floor) * (1.0 - progress(now)) ** power


def _inverse_sqrt(peak: float, warmup: int, total: int, *, timescale: int | None = None) -> Share:
    scale = timescale or warmup or 10_000
    return lambda now: jax.lax.rsqrt((now + (scale - warmup)) / scale)


def _warmup_stable_decay(
    peak: float,
    warmup: int,
    total: int,
    *,
    num_decay_steps: float,
    num_stable_steps: float | None = None,
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> Share:
    decay = warmup_length(num_decay_steps, total)
    stable = total - warmup - decay
    if stable < 0:
        raise ConfigError(
            f"lr_scheduler_kwargs.num_decay_steps: {warmup} steps of warmup and {decay} of decay "
            f"do not fit into a run of {total}. Lower warmup_steps or num_decay_steps."
        )
    if num_stable_steps is not None:
        stable = warmup_length(num_stable_steps, total)
    falls = warmup + stable
    wave = WAVES[decay_type]
    # Only the cosine has cycles: half a wave is its one fall.
    scale = 2.0 * num_cycles if decay_type == "cosine" else 1.0

    def share(now: jax.Array) -> jax.Array:
        progress = jnp.clip((now - falls) / max(decay, 1), 0.0, 1.0)
        falling = min_lr_ratio + (1.0 - min_lr_ratio) * wave(scale * progress)
        return jnp.where(now >= falls + decay, min_lr_ratio, falling)

    return share


AFTER_WARMUP: Mapping[str, Callable[..., Share]] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _warmup_stable_decay,
    "constant": _constant,
    "constant_with_warmup": _constant,
}
