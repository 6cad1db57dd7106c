"""Rotary position embedding, half-split convention: feature i is paired with feature i + K/2.

Knows angles and arrays only. Everything is float32: at position 100,000 a bfloat16 angle is off by
hundreds of radians.

    cos, sin = angles(rope, head_dim, positions)      once per forward, for all layers that share it
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.spec import RopeSpec


def frequencies(rope: RopeSpec, head_dim: int) -> np.ndarray:
    """Radians per position of each feature pair, float32 `[K/2]`, scaled as `rope` says.

    The llama3 rule is that of meta-llama/llama-models `models/llama3/model.py` (apply_scaling).
    """
    plain = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.scaling == "linear":
        scaled = plain / rope.factor
    elif rope.scaling == "llama3":
        turns = rope.original_max_positions * plain / (2 * math.pi)  # in the original context
        kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)  # 1 = short wave, untouched; 0 = long wave, stretched
        scaled = kept * plain + (1 - kept) * plain / rope.factor
    else:
        scaled = plain
    return scaled.astype(np.float32)


def angles(rope: RopeSpec, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine `[B T K/2]` float32 of integer `positions` `[B T]`."""
    per_position_k = jnp.asarray(frequencies(rope, head_dim))
    angle_BTk = jnp.einsum("BT,k->BTk", positions.astype(jnp.float32), per_position_k)
    return jnp.cos(angle_BTk), jnp.sin(angle_BTk)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`x` `[B T H K]` turned by its positions' `cos`, `sin` `[B T K/2]`; same dtype as `x`."""
    first_BTHk, second_BTHk = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos_BT1k, sin_BT1k = cos[:, :, None, :], sin[:, :, None, :]
    turned = (
        first_BTHk * cos_BT1k - second_BTHk * sin_BT1k,
        second_BTHk * cos_BT1k + first_BTHk * sin_BT1k,
    )
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
