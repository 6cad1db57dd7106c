"""Attention inside packed rows: `attend` and the implementations behind it.

Who may look at whom is data, never a property of the row: two integers per token.

    segments    1 1 1 2 2 0        tokens see tokens of their own segment; 0 is padding
    positions   0 1 2 0 1 0        and, of those, the ones that are not later
    token 4 sees tokens 3 and 4; token 5 sees nothing, and its output is zero

Every implementation has the signature of `reference` and joins the same tests. `choose` picks one
for a platform and says why; a name that was asked for is never replaced by another.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.ops.blocked import QUERY_BLOCK, blocked
from jaxtune.ops.cudnn import cudnn
from jaxtune.ops.cudnn import refuses as cudnn_refuses
from jaxtune.ops.splash import refuses as splash_refuses
from jaxtune.ops.splash import splash

LONGEST_REFERENCE_ROW = 512
MASKED_SCORE = -1e30  # finite: -inf turns the gradient of a fully masked row into NaN


class Tokens(NamedTuple):
    """One integer for each query token `[B T]` and each key token `[B S]`."""

    query: jax.Array
    key: jax.Array


class Share(NamedTuple):
    """Which tokens of a row the queries are, where each of n devices has some: of device d those
    at `order[d]`, int32 `[n T]`; `device` is this one. The keys are the whole row, in order."""

    order: np.ndarray
    device: jax.Array


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segments: tuple[jax.Array, jax.Array],
    positions: tuple[jax.Array, jax.Array],
    window: int | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
    impl: str = "reference",
    share: Share | None = None,
) -> jax.Array:
    """Causal attention of `q` `[B T H K]` over `k`, `v` `[B S G K]` -> `[B T H K]`, dtype of `q`.

    `segments` and `positions` are pairs (of queries `[B T]`, of keys `[B S]`). A query sees a key
    of the same non-zero segment if 0 <= q_pos - k_pos < `window` (None = no limit). Query head h
    reads kv head h // (H / G). `scale` defaults to K ** -0.5; `softcap` bounds the scaled scores
    to +-softcap by tanh; `sinks` `[H]` is a score per head that takes weight and gives nothing.
    Softmax in float32. A query that sees nothing gives zeros, with zero gradients. `share` is for
    kernels that go by places in the row; the others go by `positions`.
    """
    if impl not in IMPLEMENTATIONS:
        known = ", ".join(sorted(IMPLEMENTATIONS))
        raise ValueError(f"attention implementation is {impl!r}; expected one of {known}")
    more = {"share": share} if impl == "splash" else {}
    return IMPLEMENTATIONS[impl](
        q,
        k,
        v,
        segments=Tokens(*segments),
        positions=Tokens(*positions),
        window=window,
        softcap=softcap,
        sinks=sinks,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        **more,
    )


def choose(
    platform: str,
    *,
    queries: int,
    keys: int,
    head_dims: Iterable[int],
    devices: int = 1,
    dtype: str = "bfloat16",
    softcap: bool = False,
    sinks: bool = False,
    asked: str = "auto",
) -> tuple[str, str]:
    """The implementation for rows of that many queries and keys, and the reason in words.

    `devices` is over how many the queries of a row are spread.
    `dtype` is of the computation; `softcap` and `sinks` say whether any layer has them. `asked` is
    a name of `IMPLEMENTATIONS` or "auto". ValueError if what was asked for cannot be run.
    """
    kind = {"dtype": dtype, "softcap": softcap, "sinks": sinks, "devices": devices}
    refused = {
        name: reason
        for name in KERNELS
        if (reason := _refusal(name, platform, queries, keys, list(head_dims), kind))
    }
    if asked != "auto":
        if asked not in IMPLEMENTATIONS:
            known = ", ".join(sorted(IMPLEMENTATIONS))
            raise ValueError(f"there is no {asked!r}; expected auto or one of {known}")
        if asked in refused:
            raise ValueError(f"{asked} cannot be run: {refused[asked]}")
        return asked, "asked for"
    for name in KERNELS:
        if name not in refused:
            return name, f"rows of {queries} tokens on {platform}: no scores are kept"
    against = "; ".join(f"not {name}: {reason}" for name, reason in refused.items())
    if queries <= LONGEST_REFERENCE_ROW:
        return "reference", f"{queries} queries: all scores of a layer fit; {against}"
    return "blocked", (
        f"{queries} queries: above {LONGEST_REFERENCE_ROW} the scores of {QUERY_BLOCK} queries are "
        f"held at a time, and of keys that they may see; {against}"
    )


def _refusal(
    name: str, platform: str, queries: int, keys: int, head_dims: list[int], kind: dict[str, Any]
) -> str | None:
    """Why a kernel cannot be run there, for whichever of the head sizes; None if it can."""
    home = KERNELS[name]
    if platform != home and not (home == "gpu" and platform == "cuda"):
        return f"it is for {home}, here is {platform}"
    reasons = (
        splash_refuses(queries, keys, K, kind["devices"])
        if name == "splash"
        else cudnn_refuses(queries, keys, K, **kind)
        for K in head_dims
    )
    return next((reason for reason in reasons if reason), None)


def reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segments: Tokens,
    positions: Tokens,
    window: int | None,
    softcap: float | None,
    sinks: jax.Array | None,
    scale: float,
) -> jax.Array:
    """The definition: all scores at once, `[B H T S]` float32.

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
    scores_BGQS = scores_BGQS * scale
    if softcap is not None:
        scores_BGQS = softcap * jnp.tanh(scores_BGQS / softcap)
    visible_BTS = _visible(segments, positions, window)
    mask_B11TS = jnp.where(visible_BTS, 0.0, MASKED_SCORE)[:, None, None, :, :]
    scores_BGJTS = scores_BGQS.reshape(B, G, H // G, T, -1) + mask_B11TS

    top_BGJT1 = jnp.max(scores_BGJTS, axis=-1, keepdims=True)
    if sinks is not None:
        sinks_1GJ11 = sinks.astype(jnp.float32).reshape(1, G, H // G, 1, 1)
        top_BGJT1 = jnp.maximum(top_BGJT1, sinks_1GJ11)
    top_BGJT1 = jax.lax.stop_gradient(top_BGJT1)
    exps_BGJTS = jnp.exp(scores_BGJTS - top_BGJT1)
    total_BGJT1 = jnp.sum(exps_BGJTS, axis=-1, keepdims=True)
    if sinks is not None:
        total_BGJT1 = total_BGJT1 + jnp.exp(sinks_1GJ11 - top_BGJT1)

    exps_BGQS = exps_BGJTS.reshape(B, G, -1, k.shape[1]).astype(v.dtype)
    mixed_BGQK = jnp.einsum(
        "BGQS,BGSK->BGQK", exps_BGQS, v_BGSK, preferred_element_type=jnp.float32
    )
    out_BGJTK = mixed_BGQK.reshape(B, G, H // G, T, K) / total_BGJT1
    sees_B11T1 = jnp.any(visible_BTS, axis=-1)[:, None, None, :, None]
    out_BGJTK = jnp.where(sees_B11T1, out_BGJTK, 0.0)
    return jnp.moveaxis(out_BGJTK, 3, 1).reshape(B, T, H, K).astype(q.dtype)


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference,
    "blocked": blocked,
    "splash": splash,
    "cudnn": cudnn,
}
KERNELS = {"splash": "tpu", "cudnn": "gpu"}  # and the platform each is for
# What the partitioner cannot cut well: run on each device's own rows and heads.
OPAQUE = frozenset({"blocked", "splash", "cudnn"})


def _visible(segments: Tokens, positions: Tokens, window: int | None) -> jax.Array:
    """Which keys each query sees, bool `[B T S]`."""
    same_BTS = segments.query[:, :, None] == segments.key[:, None, :]
    real_BT1 = (segments.query != 0)[:, :, None]
    distance_BTS = positions.query[:, :, None] - positions.key[:, None, :]
    visible_BTS = same_BTS & real_BT1 & (distance_BTS >= 0)
    return visible_BTS if window is None else visible_BTS & (distance_BTS < window)
