"""Rotary position embedding, half-split convention: feature i is paired with feature i + K/2.

Knows angles and arrays only. Everything is float32: at position 100,000 a bfloat16 angle is off by
hundreds of radians.

    cos, sin = angles(rope, head_dim, positions, segment_ids)   once, for all layers that share it
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.spec import RopeSpec


def frequencies(rope: RopeSpec, head_dim: int, *, long: bool = False) -> np.ndarray:
    """Radians per position of each rotated feature pair, float32 `[k]`, scaled as `rope` says.

    `long` is a text of more than `original_max_positions` tokens; only longrope asks. The llama3
    rule is that of meta-llama/llama-models `models/llama3/model.py` (apply_scaling), the yarn rule
    that of jquesnelle/yarn `scaled_rope/LlamaYaRNScaledRotaryEmbedding.py`.
    """
    dims = rope.rotated(head_dim)
    plain = rope.theta ** -(np.arange(0, dims, 2, dtype=np.float64) / dims)
    stretched = plain / rope.factor
    if rope.scaling == "linear":
        scaled = stretched
    elif rope.scaling == "llama3":
        turns = rope.original_max_positions * plain / (2 * math.pi)  # in the original context
        ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        unstretched = np.clip(ramp, 0.0, 1.0)  # 1 = short wave; 0 = long wave, stretched
        scaled = unstretched * plain + (1 - unstretched) * stretched
    elif rope.scaling == "yarn":
        unstretched = _unstretched_by_yarn(rope, dims)
        scaled = unstretched * plain + (1 - unstretched) * stretched
    elif rope.scaling == "longrope":
        scaled = plain / np.array(rope.long_factors if long else rope.short_factors)
    else:
        scaled = plain
    return scaled.astype(np.float32)


def _unstretched_by_yarn(rope: RopeSpec, dims: int) -> np.ndarray:
    """`[k]`: 1 for pairs that are left alone, 0 for those that are stretched, a ramp between."""

    def pair(turns: float) -> float:
        """Return the feature pair that turns so many times within the original context."""
        wave = rope.original_max_positions / (turns * 2 * math.pi)
        return dims * math.log(wave) / (2 * math.log(rope.theta))

    first, last = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    # The published rule's own guard against a ramp without length.
    length = last - first if last != first else 0.001
    unstretched: np.ndarray = 1 - np.clip((np.arange(dims // 2) - first) / length, 0.0, 1.0)
    return unstretched


def angles(
    rope: RopeSpec,
    head_dim: int,
    positions: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    last: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine `[B T k]` float32 of integer `positions` `[B T]`, of k rotated pairs.

    `segment_ids` `[B T]` separate the texts of a row (None = one text); texts are contiguous. The
    frequencies of longrope follow from the last position of a token's own text among these, so a
    packed row equals its texts alone. `last` `[B T]` are these positions (`last_positions`), for
    tokens that are a part of their row.
    """
    positions_BT1 = positions.astype(jnp.float32)[:, :, None]
    per_position_11k = jnp.asarray(frequencies(rope, head_dim))[None, None, :]
    if rope.scaling == "longrope":
        last_BT = last_positions(positions, segment_ids) if last is None else last
        is_long_BT = last_BT >= rope.original_max_positions
        long_11k = jnp.asarray(frequencies(rope, head_dim, long=True))[None, None, :]
        shape_BTk = (*positions.shape, long_11k.shape[-1])
        per_position_11k = jnp.where(
            jnp.broadcast_to(is_long_BT[:, :, None], shape_BTk),
            jnp.broadcast_to(long_11k, shape_BTk),
            jnp.broadcast_to(per_position_11k, shape_BTk),
        )
    angle_BTk = positions_BT1 * per_position_11k
    return rope.attention_factor * jnp.cos(angle_BTk), rope.attention_factor * jnp.sin(angle_BTk)


def last_positions(positions: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Of each token, the position of the last token of its text: `[B T]`.

    positions 0 1 2 0 1 0, segments 1 1 1 2 2 0  ->  2 2 2 1 1 0
    """
    B, T = positions.shape
    if segment_ids is None:
        segment_ids = jnp.zeros_like(positions)
    ends_BT = jnp.concatenate(
        [segment_ids[:, 1:] != segment_ids[:, :-1], jnp.ones((B, 1), bool)], axis=1
    )
    places_BT = jnp.broadcast_to(jnp.arange(T)[None, :], (B, T))
    nearest_end_BT = jax.lax.cummin(jnp.where(ends_BT, places_BT, T), axis=1, reverse=True)
    return jnp.take_along_axis(positions, nearest_end_BT, axis=1)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False) -> jax.Array:
    """`x` `[B T H K]` turned by its positions' `cos`, `sin` `[B T k]`; same dtype as `x`.

    The first 2k features are turned, feature i with feature i + k; the others stay. `interleaved`
    turns feature 2i with 2i + 1 and leaves the two at i and i + k: another order of features, which
    the product of a query and a key, both turned so, does not see.
    """
    k = cos.shape[-1]
    turned_BTHk = x[..., : 2 * k].astype(jnp.float32)
    if interleaved:
        pairs_BTHk2 = turned_BTHk.reshape(*x.shape[:-1], k, 2)
        first_BTHk, second_BTHk = pairs_BTHk2[..., 0], pairs_BTHk2[..., 1]
    else:
        first_BTHk, second_BTHk = turned_BTHk[..., :k], turned_BTHk[..., k:]
    cos_BT1k, sin_BT1k = cos[:, :, None, :], sin[:, :, None, :]
    turned = (
        first_BTHk * cos_BT1k - second_BTHk * sin_BT1k,
        second_BTHk * cos_BT1k + first_BTHk * sin_BT1k,
    )
    unrotated = (x[..., 2 * k :],) if x.shape[-1] > 2 * k else ()
    return jnp.concatenate([*(part.astype(x.dtype) for part in turned), *unrotated], axis=-1)


def grown(rope: RopeSpec, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Queries `x` `[B T H K]` at `positions` `[B T]`, longer by `rope.growth` the later they come.

    So that attention stays as sharp among many keys (arXiv 2501.19399; as in Llama 4).
    """
    if not rope.growth:
        return x
    periods_BT = jnp.floor(positions.astype(jnp.float32) / rope.original_max_positions)
    factor_BT11 = (1.0 + rope.growth * jnp.log1p(periods_BT))[:, :, None, None]
    return (x.astype(jnp.float32) * factor_BT11).astype(x.dtype)
