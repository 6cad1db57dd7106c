"""Attention by the TPU's splash kernel (jax.experimental.pallas): no scores in HBM, ever.

The signature of `attention.reference`, for rows that attend to themselves: query t is key t, so
"not later, same segment" is a mask over indices, and blocks that it empties are never visited.
Rows are filled up to whole tiles with segment 0. Under a mesh it must be run per shard: a kernel
is opaque to the partitioner.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

TILE = 128  # the kernel's granule of queries and keys
BLOCK = 512  # 2048 does not fit the scoped VMEM of a v5e; 1024 compiles


def refuses(queries: int, keys: int, head_dim: int) -> str | None:
    """Why these sizes cannot be run, or None."""
    if queries != keys:
        return f"{queries} queries over {keys} keys: the kernel is for rows that see themselves"
    if head_dim % 8:
        return f"head_dim {head_dim} is no multiple of 8"
    return None


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segments: Any,
    positions: Any,
    window: int | None,
    softcap: float | None,
    sinks: jax.Array | None,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """`attention.reference` for positions that grow by one inside each segment.

    `positions` is not read: distance in the row is distance in the text. `interpret` runs the
    kernel as plain JAX, to be tested anywhere. Raises ValueError for sizes it `refuses`.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    T, H, K = q.shape[1:]
    if reason := refuses(T, k.shape[1], K):
        raise ValueError(f"splash attention: {reason}")
    rest = -T % TILE
    q_BTHK = (q.astype(jnp.float32) * scale).astype(q.dtype)
    q_BHTK, k_BGTK, v_BGTK = (jnp.swapaxes(_filled(x, rest), 1, 2) for x in (q_BTHK, k, v))
    segments_BT = _filled(segments.query, rest)
    kernel = _kernel(T + rest, H, window, softcap, interpret)

    def one_row(q_HTK: jax.Array, k_GTK: jax.Array, v_GTK: jax.Array, ids_T: jax.Array) -> Any:
        ids = kernels.SegmentIds(ids_T, ids_T)
        return kernel(q_HTK, k_GTK, v_GTK, ids, *(() if sinks is None else (sinks,)))

    mixed_BHTK = jax.vmap(one_row)(q_BHTK, k_BGTK, v_BGTK, segments_BT)
    mixed_BTHK = jnp.swapaxes(mixed_BHTK, 1, 2)[:, :T]
    return jnp.where((segments.query != 0)[:, :, None, None], mixed_BTHK, 0).astype(q.dtype)


def _kernel(
    length: int, heads: int, window: int | None, softcap: float | None, interpret: bool
) -> Any:
    """The kernel of one shape; its mask is a few numbers, made lazily, never `[T T]`."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    mask: masks.Mask = masks.CausalMask(shape)
    if window is not None and window < length:
        mask = masks.LocalMask(shape, (window - 1, 0), 0)
    block = math.gcd(length, BLOCK)
    return kernels.make_splash_mha_single_device(
        mask=masks.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            use_fused_bwd_kernel=True,
        ),
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )


def _filled(x_BT: jax.Array, rest: int) -> jax.Array:
    return jnp.pad(x_BT, [(0, 0), (0, rest)] + [(0, 0)] * (x_BT.ndim - 2))
