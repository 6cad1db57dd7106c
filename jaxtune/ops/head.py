"""The output head: how hidden states become logits, whole or a block of the vocabulary at a time.

Training, evaluation and decoding all read `Head`. It also holds how the kernel is sharded: its
width over devices that gather it block by block, its vocabulary over devices that keep their own.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxtune.ops.product import einsum_f32


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["kernel"],
    meta_fields=["scale", "softcap", "by_token", "gather", "scatter", "shards"],
)
@dataclass(frozen=True)
class Head:
    """A kernel and how it is applied: softcap * tanh(scale * hidden @ kernel / softcap).

    A pytree; its leaf is the kernel, as stored, any dtype: `[D V]`, or with `by_token` a table
    `[V D]`. Without `softcap` logits are not bounded.

    Where the kernel holds only this device's slice of D, `gather` makes the whole of D of a block
    of it (same layout, in the dtype it is multiplied in), and `scatter` sums the gradient of such a
    whole block over devices and keeps this device's slice. `shards` is over how many devices V is
    spread automatically: every block takes an equal part of each shard.
    """

    kernel: jax.Array
    scale: float = 1.0
    softcap: float | None = None
    by_token: bool = False
    gather: Callable[[jax.Array], jax.Array] | None = None
    scatter: Callable[[jax.Array], jax.Array] | None = None
    shards: int = 1

    @property
    def vocab(self) -> int:
        return self.kernel.shape[0 if self.by_token else 1]


class VocabBlock(NamedTuple):
    """A block of the vocabulary: `kernel` `[D W]`, by token `[W D]`, of equal parts of each shard.

    `ids` `[shards W/shards]`; with `overlaps`, -1 where an earlier block had that entry.
    """

    kernel: jax.Array
    ids: jax.Array
    start: jax.Array | int
    overlaps: bool


def logits(hidden: jax.Array, head: Head) -> jax.Array:
    """Float32 `[B T V]` of `hidden` `[B T D]`, multiplied in the dtype of `hidden`."""
    kernel = head.kernel.astype(hidden.dtype)
    if head.gather is not None:
        kernel = head.gather(kernel)
    equation = "BTD,VD->BTV" if head.by_token else "BTD,DV->BTV"
    return _scaled_and_capped(einsum_f32(equation, hidden, kernel), head)


def block_logits(hidden: jax.Array, block: VocabBlock, head: Head) -> jax.Array:
    """Float32 `[.. shards W/shards]` of `hidden` `[.. D]`."""
    lead, kernel = token_letters(hidden), "WD" if head.by_token else "DW"
    products = einsum_f32(f"{lead}D,{kernel}->{lead}W", hidden, block.kernel)
    return _scaled_and_capped(products, head).reshape(*hidden.shape[:-1], *block.ids.shape)


def vocab_block(head: Head, size: int, blocks: int, number: Any, dtype: DTypeLike) -> VocabBlock:
    """Block `number` of `size` entries of each shard: cast to `dtype`, then gathered.

    The last of `blocks` may overlap the one before it.
    """
    shard = head.vocab // head.shards
    start = jnp.minimum(number * size, shard - size) if blocks > 1 else 0
    part = lax.dynamic_slice_in_dim(_by_shard(head, head.kernel), start, size, _axis(head))
    part = _joined(head, part).astype(dtype)
    if head.gather is not None:
        part = head.gather(part)
    within = start + jnp.arange(size, dtype=jnp.int32)
    ids = jnp.arange(head.shards, dtype=jnp.int32)[:, None] * shard + within[None, :]
    overlaps = blocks * size != shard
    if overlaps:
        ids = jnp.where((within >= number * size)[None, :], ids, -1)
    return VocabBlock(part, ids, start, overlaps)


def block_rows(head: Head, block: VocabBlock) -> jax.Array:
    """The kernel of a block as `[shards W/shards D]`, for the gradient of hidden states."""
    rows = _by_shard(head, block.kernel)
    return rows if head.by_token else row_major(jnp.moveaxis(rows, 0, -1))


def add_block_gradient(
    head: Head, d_kernel: jax.Array, d_block: jax.Array, block: VocabBlock
) -> jax.Array:
    """`d_kernel` with the gradient `[D W]` of the whole `block` added, scattered."""
    d_block = d_block.T if head.by_token else d_block
    if head.scatter is not None:
        d_block = head.scatter(d_block)
    part = _by_shard(head, d_block.astype(d_kernel.dtype))
    total = _by_shard(head, d_kernel)
    if block.overlaps:
        size = block.ids.shape[1]
        part = part + lax.dynamic_slice_in_dim(total, block.start, size, _axis(head))
    total = lax.dynamic_update_slice_in_dim(total, part, block.start, _axis(head))
    return total.reshape(d_kernel.shape)


def token_letters(hidden: jax.Array) -> str:
    """The letters of the dimensions of `hidden` before its features, for an einsum."""
    return "BT" if hidden.ndim == 3 else "N"


def row_major(x: jax.Array) -> jax.Array:
    """`x`, on a CPU in the order of its axes: products along columns take twice as long there."""
    same: jax.Array = lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)
    return same


def _scaled_and_capped(products: jax.Array, head: Head) -> jax.Array:
    if head.scale != 1.0:
        products = products * head.scale
    if head.softcap is not None:
        products = head.softcap * jnp.tanh(products / head.softcap)
    return products


def _by_shard(head: Head, kernel: jax.Array) -> jax.Array:
    """`[D V]` as `[D shards W]`, `[V D]` as `[shards W D]`."""
    if head.by_token:
        return kernel.reshape(head.shards, -1, kernel.shape[1])
    return kernel.reshape(kernel.shape[0], head.shards, -1)


def _joined(head: Head, by_shard: jax.Array) -> jax.Array:
    if head.by_token:
        return by_shard.reshape(-1, by_shard.shape[2])
    return by_shard.reshape(by_shard.shape[0], -1)


def _axis(head: Head) -> int:
    return 1 if head.by_token else 2
