"""Attention by the TPU's splash kernel (jax.experimental.pallas): no scores in HBM, ever.

The signature of `reference`, for rows that attend to themselves: query t is key t, so
"not later, same segment" is a mask over indices, and blocks that it empties are never visited.
Rows are filled up to whole tiles with segment 0. Under a mesh it must be run per shard: a kernel
is opaque to the partitioner.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from jaxtune.ops.reference import AttentionMask, AttentionShape, AttentionSpec, ContextShard

TILE = 128  # the kernel's granule of queries and keys
PARTS = 8  # the fused backward kernel keeps that many partial sums of dq in HBM, one a key block


class BlockSizes(NamedTuple):
    """The tokens of queries and of keys that lie in VMEM at a time, and of keys whose scores do."""

    queries: int
    keys: int
    scores: int
    fused: bool


def blocks(length: int, queries: int, head_dim: int) -> BlockSizes:
    """Choose sizes for rows of `length`, of which a device has `queries`; multiples of `TILE`.

    The same on every generation.

    512 up to 4096 tokens: less is visited beyond the diagonal. Then 1024, which halves what the
    fused backward kernel keeps, unless heads are above 128: on a v4 these with softcap, window and
    sinks need 17.7 of 16 MiB of VMEM. 2048 fits neither v4, v5e nor v5p. Compiled for v4, v5e, v5p,
    v6e and tpu7x (libtpu 0.0.51); not yet measured on a TPU.

    The fused kernel makes scores once less, for `length / keys` partial sums of dq. Beyond
    `PARTS` of them there are two kernels: at 32k and two heads 169 MiB instead of 576.
    """
    longest = 1024 if length > 4096 and head_dim <= 128 else 512
    keys = math.gcd(length, longest)
    return BlockSizes(math.gcd(queries, keys), keys, min(keys, 512), length // keys <= PARTS)


def unsupported(shape: AttentionShape) -> str | None:
    """Return the reason why attention of this shape cannot be run, or None."""
    queries, devices = shape.queries, shape.devices
    if queries != shape.keys:
        return (
            f"{queries} queries over {shape.keys} keys: the kernel is for rows that see themselves"
        )
    for head_dim in shape.head_dims:
        if head_dim % 8:
            return f"head_dim {head_dim} is no multiple of 8"
    if devices > 1 and queries % (devices * TILE):
        return f"{queries} queries are no multiple of {TILE} on each of {devices} devices"
    return None


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: AttentionMask,
    spec: AttentionSpec,
    *,
    shard: ContextShard | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attend as `reference` does, for positions that grow by one inside each segment.

    Positions are not read: distance in the row is distance in the text. With a `shard` the queries
    are that device's part of the row, and the keys all of it. `interpret` runs the kernel as plain
    JAX, to be tested anywhere.
    Raises: ValueError for what is `unsupported`.
    """
    T, H, K = q.shape[1:]
    devices = 1 if shard is None else len(shard.order)
    shape = AttentionShape(T * devices, k.shape[1], (K,), devices)
    if reason := unsupported(shape):
        raise ValueError(f"splash attention: {reason}")
    rest = -T % TILE  # none where devices share a row
    q_BTHK = (q.astype(jnp.float32) * spec.scale).astype(q.dtype)
    q_BHTK, k_BGTK, v_BGTK = (jnp.swapaxes(_filled(x, rest), 1, 2) for x in (q_BTHK, k, v))
    ids_BT, ids_BS = _filled(mask.query_segments, rest), _filled(mask.key_segments, rest)
    kernel = _kernel(k_BGTK.shape[2], H, K, spec, shard, interpret)

    def one_row(q_HTK: jax.Array, k_GSK: jax.Array, v_GSK: jax.Array, *ids: jax.Array) -> Any:
        sinks = () if spec.sinks is None else (spec.sinks,)
        return kernel(q_HTK, k_GSK, v_GSK, kernels.SegmentIds(*ids), *sinks)

    mixed_BHTK = jax.vmap(one_row)(q_BHTK, k_BGTK, v_BGTK, ids_BT, ids_BS)
    mixed_BTHK = jnp.swapaxes(mixed_BHTK, 1, 2)[:, :T]
    return jnp.where((mask.query_segments != 0)[:, :, None, None], mixed_BTHK, 0).astype(q.dtype)


def _kernel(
    length: int,
    heads: int,
    head_dim: int,
    spec: AttentionSpec,
    shard: ContextShard | None,
    interpret: bool,
) -> Any:
    """Make the kernel of one shape; its mask is a few numbers, made lazily, never `[T T]`.

    With a `shard` its mask is made for the queries of all devices one after the other, and of that
    this device's part is taken when it runs.
    """
    shape = (length, length)
    mask: Any = masks.CausalMask(shape)
    if spec.window is not None and spec.window < length:
        mask = masks.LocalMask(shape, (spec.window - 1, 0), 0)
    devices = 1
    if shard is not None:
        devices = len(shard.order)
        mask.q_sequence = shard.order.reshape(-1)
    sizes = blocks(length, length // devices, head_dim)
    kernel = kernels.make_splash_mha(
        mask=masks.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=sizes.queries,
            block_kv=sizes.keys,
            block_kv_compute=sizes.scores,
            block_q_dkv=sizes.queries,
            block_kv_dkv=sizes.keys,
            block_kv_dkv_compute=sizes.scores,
            block_q_dq=None if sizes.fused else sizes.queries,
            block_kv_dq=None if sizes.fused else sizes.keys,
            use_fused_bwd_kernel=sizes.fused,
        ),
        attn_logits_soft_cap=spec.softcap,
        head_shards=1,
        q_seq_shards=devices,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    return kernel if shard is None else _own(kernel, shard)


def _own(kernel: Any, shard: ContextShard) -> Any:
    """Take the part of a kernel for the queries of all devices that is for this device's."""

    def part(x: jax.Array | None, axis: int) -> jax.Array | None:
        if x is None:
            return None
        size = x.shape[axis] // len(shard.order)
        return jax.lax.dynamic_slice_in_dim(x, shard.device * size, size, axis)

    def own(info: Any) -> Any:
        if info is None:
            return None
        by_block = {
            name: part(getattr(info, name), 1) for name in ("data_next", "mask_next", "block_mask")
        }
        return info._replace(**by_block, q_sequence=part(info.q_sequence, 0))

    infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    return type(kernel)(*map(own, infos), **kernel.kwargs)


def _filled(x_BT: jax.Array, rest: int) -> jax.Array:
    return jnp.pad(x_BT, [(0, 0), (0, rest)] + [(0, 0)] * (x_BT.ndim - 2))
