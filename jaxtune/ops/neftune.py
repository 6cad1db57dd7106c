"""NEFTune (Jain et al., arXiv:2310.05914): uniform noise on the embeddings while training."""

import math

import jax
import jax.numpy as jnp


def uniform(bits: jax.Array) -> jax.Array:
    """f32 within +-1, evenly, of random `bits`, uint32 of the same shape."""
    return (bits >> 8).astype(jnp.float32) * 2.0**-23 - 1.0  # 24 bits, which f32 holds


def noise(
    draws: jax.Array, segment_ids: jax.Array, alpha: float, *, row_segments: jax.Array | None = None
) -> jax.Array:
    """`[B T D]` f32: `draws`, uniform within +-1, times alpha / sqrt(length x D) at every token.

    `segment_ids` `[B T]`, 0 is padding and gets none; `row_segments` `[B S]` are those of whole
    rows, where these are a part of them. The length is that of the token's own segment: packed or
    padded, an example gets the noise it would get alone, as in the authors' code. Hugging Face
    takes the length of the padded row, which for short examples is less noise.
    """
    everyone = segment_ids if row_segments is None else row_segments
    rows, length = everyone.shape
    counts = jnp.zeros((rows, length + 1), jnp.float32)
    counts = counts.at[jnp.arange(rows)[:, None], everyone].add(1.0)
    lengths = jnp.take_along_axis(counts, segment_ids, axis=1)
    width = draws.shape[-1]
    bound = jnp.where(segment_ids > 0, alpha / (math.sqrt(width) * jnp.sqrt(lengths)), 0.0)
    return bound[:, :, None] * draws
