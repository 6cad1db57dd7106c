"""Attention of one new token a row over the row's cached keys and values.

Who sees what is `visible`, nothing else: slots may be in any order, as those of a ring buffer are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxtune.ops.reference import MASKED_SCORE, AttentionSpec


def attend_slots(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    visible: jax.Array,
    spec: AttentionSpec,
) -> jax.Array:
    """Attend from `q` `[B H K]` over `k`, `v` `[B G S K]` -> `[B H K]`.

    Row b sees `visible[b]` `[S]`, whatever the window of `spec`. The rest is as in
    `ops.attention.attend`: the groups of heads, softmax in float32, and zeros for a query that
    sees nothing.
    """
    (B, H, K), sinks = q.shape, spec.sinks
    G = k.shape[1]
    q_BGJK = q.reshape(B, G, H // G, K)
    scores_BGJS = jnp.einsum("BGJK,BGSK->BGJS", q_BGJK, k, preferred_element_type=jnp.float32)
    scores_BGJS = scores_BGJS * spec.scale
    if spec.softcap is not None:
        scores_BGJS = spec.softcap * jnp.tanh(scores_BGJS / spec.softcap)
    scores_BGJS = scores_BGJS + jnp.where(visible, 0.0, MASKED_SCORE)[:, None, None, :]
    top_BGJ1 = jnp.max(scores_BGJS, axis=-1, keepdims=True)
    if sinks is not None:
        sinks_1GJ1 = sinks.astype(jnp.float32).reshape(1, G, H // G, 1)
        top_BGJ1 = jnp.maximum(top_BGJ1, sinks_1GJ1)
    exps_BGJS = jnp.exp(scores_BGJS - top_BGJ1)
    total_BGJ1 = jnp.sum(exps_BGJS, axis=-1, keepdims=True)
    if sinks is not None:
        total_BGJ1 = total_BGJ1 + jnp.exp(sinks_1GJ1 - top_BGJ1)
    mixed_BGJK = jnp.einsum(
        "BGJS,BGSK->BGJK", exps_BGJS.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    sees_B111 = jnp.any(visible, axis=-1)[:, None, None, None]
    mixed_BGJK = jnp.where(sees_B111, mixed_BGJK / total_BGJ1, 0.0)
    return mixed_BGJK.reshape(B, H, K).astype(q.dtype)
