"""NEFTune (Jain et al., arXiv:2310.05914): uniform noise on the embeddings while training."""

import math

import jax
import jax.numpy as jnp


def noise(key: jax.Array, segment_ids: jax.Array, width: int, alpha: float) -> jax.Array:
    """`[B T width]` f32, uniform within +-alpha / sqrt(length x width) at every token.

    `segment_ids` `[B T]`, 0 is padding and gets none. The length is that of the token's own
    segment: packed or padded, an example gets the noise it would get alone, as in the authors'
    code. Hugging Face takes the length of the padded row, which for short examples is less noise.
    """
    rows, length = segment_ids.shape
    counts = jnp.zeros((rows, length + 1), jnp.float32)
    counts = counts.at[jnp.arange(rows)[:, None], segment_ids].add(1.0)
    lengths = jnp.take_along_axis(counts, segment_ids, axis=1)
    bound = jnp.where(segment_ids > 0, alpha / (math.sqrt(width) * jnp.sqrt(lengths)), 0.0)
    draws = jax.random.uniform(key, (rows, length, width), jnp.float32, -1.0, 1.0)
    return bound[:, :, None] * draws
