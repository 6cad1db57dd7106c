"""Attention as it is defined, and the values that every implementation takes.

Who may look at whom is data, never a property of the row: two integers per token.

    segments    1 1 1 2 2 0        tokens see tokens of their own segment; 0 is padding
    positions   0 1 2 0 1 0        and, of those, the ones that are not later
    token 4 sees tokens 3 and 4; token 5 sees nothing, and its output is zero
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MASKED_SCORE = -1e30  # finite: -inf turns the gradient of a fully masked row into NaN


class AttentionMask(NamedTuple):
    """Two integers for each query token `[B T]` and each key token `[B S]`.

    A query sees a key of the same non-zero segment if 0 <= its position - the key's < window.
    """

    query_segments: jax.Array
    key_segments: jax.Array
    query_positions: jax.Array
    key_positions: jax.Array


class AttentionSpec(NamedTuple):
    """The mathematics of one layer's attention beside its mask.

    `window` None is no limit; `softcap` bounds the scaled scores to
    +-softcap by tanh; `sinks` `[H]` is a score per head that takes weight and gives nothing.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: jax.Array | None = None


class AttentionShape(NamedTuple):
    """Sizes by which an implementation is chosen, known before anything runs.

    `devices` is over how many the queries of a row are spread, `dtype` that of the computation;
    `softcap` and `sinks` say whether any layer has them.
    """

    queries: int
    keys: int
    head_dims: tuple[int, ...]
    devices: int = 1
    dtype: str = "bfloat16"
    softcap: bool = False
    sinks: bool = False


class ContextShard(NamedTuple):
    """A device of the n that share the queries of a row: device d has those at `order[d]`.

    `order` is int32 `[n T]`; `device` is this one. The keys are the whole row, in order.
    """

    order: np.ndarray
    device: jax.Array


def reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: AttentionMask,
    spec: AttentionSpec,
) -> jax.Array:
    """Attend with all scores at once, `[B H T S]` float32: the definition.

    J is query heads per kv head, Q = J * T: all queries that read the same keys are rows of one
    product. Batch dimensions first, and a mask that is added rather than selected: XLA knows this
    form as a softmax on CPU and runs it five times as fast as the obvious one.
    """
    B, T, H, K = q.shape
    G = k.shape[2]
    q_BGJTK = jnp.moveaxis(q.reshape(B, T, G, H // G, K), 1, 3)
    q_BGQK = q_BGJTK.reshape(B, G, -1, K)
    k_BGSK, v_BGSK = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)

    scores_BGQS = jnp.einsum("BGQK,BGSK->BGQS", q_BGQK, k_BGSK, preferred_element_type=jnp.float32)
    scores_BGQS = scores_BGQS * spec.scale
    if spec.softcap is not None:
        scores_BGQS = spec.softcap * jnp.tanh(scores_BGQS / spec.softcap)
    visible_BTS = _visible(mask, spec.window)
    added_B11TS = jnp.where(visible_BTS, 0.0, MASKED_SCORE)[:, None, None, :, :]
    scores_BGJTS = scores_BGQS.reshape(B, G, H // G, T, -1) + added_B11TS

    top_BGJT1 = jnp.max(scores_BGJTS, axis=-1, keepdims=True)
    if spec.sinks is not None:
        sinks_1GJ11 = spec.sinks.astype(jnp.float32).reshape(1, G, H // G, 1, 1)
        top_BGJT1 = jnp.maximum(top_BGJT1, sinks_1GJ11)
    top_BGJT1 = jax.lax.stop_gradient(top_BGJT1)
    exps_BGJTS = jnp.exp(scores_BGJTS - top_BGJT1)
    total_BGJT1 = jnp.sum(exps_BGJTS, axis=-1, keepdims=True)
    if spec.sinks is not None:
        total_BGJT1 = total_BGJT1 + jnp.exp(sinks_1GJ11 - top_BGJT1)

    exps_BGQS = exps_BGJTS.reshape(B, G, -1, k.shape[1]).astype(v.dtype)
    mixed_BGQK = jnp.einsum(
        "BGQS,BGSK->BGQK", exps_BGQS, v_BGSK, preferred_element_type=jnp.float32
    )
    out_BGJTK = mixed_BGQK.reshape(B, G, H // G, T, K) / total_BGJT1
    sees_B11T1 = jnp.any(visible_BTS, axis=-1)[:, None, None, :, None]
    out_BGJTK = jnp.where(sees_B11T1, out_BGJTK, 0.0)
    return jnp.moveaxis(out_BGJTK, 3, 1).reshape(B, T, H, K).astype(q.dtype)


def _visible(mask: AttentionMask, window: int | None) -> jax.Array:
    """Return the mask of the keys that each query sees, bool `[B T S]`."""
    same_BTS = mask.query_segments[:, :, None] == mask.key_segments[:, None, :]
    real_BT1 = (mask.query_segments != 0)[:, :, None]
    distance_BTS = mask.query_positions[:, :, None] - mask.key_positions[:, None, :]
    visible_BTS = same_BTS & real_BT1 & (distance_BTS >= 0)
    return visible_BTS if window is None else visible_BTS & (distance_BTS < window)
