"""Collectives inside of a step: one function on every device, and what devices exchange.

Training and evaluation run under `shard_map_step`: one function on every device's own rows, tokens
and slices of weights. There a weight is `all_gathered` where it is used and its gradient is
reduce-scattered, by collectives in the code. The compiler shards over `tensor`, guided by
`mesh.constrain`. The table of who holds which slice is in `mesh`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxtune.parallel.mesh import (
    AXES,
    MANUAL,
    ROWS,
    RULES,
    SIZES,
    Axes,
    automatic,
    cut_over,
    cuts,
    in_context,
    manual,
    partition_spec,
    row_shards,
)
from jaxtune.tree import map_named

B = TypeVar("B")  # a NamedTuple of arrays [B T ...]
Sums = TypeVar("Sums")  # a pytree of arrays
LANES = 128  # a slice of a table's rows is not cut narrower than a vector of the TPU
EVERYWHERE = PartitionSpec()


def shard_map_step(
    f: Callable[..., Any], mesh: Mesh, in_specs: Sequence[Any], out_specs: Any
) -> Any:
    """Map `f` over the devices, each with its own rows, tokens and slices of weights.

    `in_specs` are of its arguments, `out_specs` of its result: `slices`, `tokens`, or
    `EVERYWHERE`. Inside, `all_gathered` makes weights whole; a gradient is of the SUM of what all
    devices return, so nothing is added up before `summed` and `total`. Axes of size 1 are each
    device's own too, so that a kernel finds none that the compiler would have to cut.
    """
    own = frozenset(name for name in AXES if name in MANUAL or mesh.shape[name] == 1)
    return jax.shard_map(
        f, mesh=mesh, in_specs=tuple(in_specs), out_specs=out_specs, axis_names=own, check_vma=False
    )


def slices(axes: Any, tree: Any, mesh: Mesh) -> Any:
    """Return the specs, for `shard_map_step`, of weights with these logical axes."""
    return map_named(
        lambda _, leaf, names: partition_spec(names, leaf.shape, mesh, only=MANUAL), tree, axes
    )


def tokens(shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Return the spec, for `shard_map_step`, of arrays `[B T]`.

    Raises `ValueError` where they do not divide.
    """
    sizes = row_shards(mesh), mesh.shape["context"]
    if shape[0] % sizes[0] or shape[1] % sizes[1]:
        raise ValueError(
            f"a batch of {shape[0]} rows x {shape[1]} tokens does not divide over {sizes[0]} "
            f"devices along {', '.join(SIZES[:3])} and {sizes[1]} along context"
        )
    return PartitionSpec(ROWS, "context")


def cut(axis: str | None, size: int) -> tuple[str, ...]:
    """List the mesh axes over which each device has its own slice of a dimension of `size`."""
    mesh = in_context()
    return () if mesh is None else cut_over(axis, size, mesh, manual(mesh))


def _beside(f: Callable[[jax.Array], jax.Array], x: jax.Array, axes: Axes) -> jax.Array:
    """Call `f(x)`, a collective along each device's own axes, on slices along the automatic ones.

    Left to itself the compiler makes those whole first.
    """
    mesh = in_context()
    free = () if mesh is None else automatic(mesh)
    if not free:
        return f(x)
    spec = partition_spec(axes, x.shape, mesh, only=free)
    names = frozenset(free)
    return jax.shard_map(f, in_specs=spec, out_specs=spec, axis_names=names, check_vma=False)(x)


class _Cut(NamedTuple):
    """An array of logical `axes` whose dimension `dim` is in slices along the mesh axes `over`."""

    axes: Axes
    dim: int
    over: tuple[str, ...]

    def whole(self, x: jax.Array) -> jax.Array:
        """Join all slices."""
        if not self.over:
            return x
        # Over three dimensions of a torus at once the TPU compiler makes an all-reduce of it.
        at_once = [self.over] if len(self.over) < 3 else [(name,) for name in reversed(self.over)]

        def join(x: jax.Array) -> jax.Array:
            for names in at_once:
                x = jax.lax.all_gather(x, names, axis=self.dim, tiled=True)
            return x

        return _beside(join, x, self.axes)

    def summed(self, x: jax.Array) -> jax.Array:
        """Add up `x` over the devices, of which each gets its slice: the inverse of `whole`."""

        def scatter(x: jax.Array) -> jax.Array:
            for name in self.over:
                x = jax.lax.psum_scatter(x, name, scatter_dimension=self.dim, tiled=True)
            return x

        return _beside(scatter, x, self.axes) if self.over else x


def _cut(axes: Axes, shape: Sequence[int]) -> _Cut:
    """Find the sharded dimension of an array of `shape` in all.

    Experts side by side stay where they are: of what is left no weight has two such dimensions.
    """
    mesh = in_context()
    every = [()] * len(axes) if mesh is None else cuts(axes, shape, mesh, manual(mesh))
    sharded = [(dim, over) for dim, over in enumerate(every) if over and axes[dim] != "expert"]
    return _Cut(axes, *(sharded[0] if sharded else (0, ())))


def row_devices() -> int:
    """Count the devices that share a row's tokens; 1 outside of `shard_map_step`."""
    mesh = in_context()
    return 1 if mesh is None or "context" not in manual(mesh) else mesh.shape["context"]


def zigzag_positions(length: int, devices: int) -> np.ndarray:
    """List the tokens of a row that each device has, int32 `[devices length/devices]`.

    Under a causal mask a token costs as much as stands before it, so a device has a stretch from
    the front and the one as far from the back: all cost the same. Plain stretches, where the row
    does not divide into two for each device.

        zigzag_positions(8, 2)  ->  0 1 6 7
                          2 3 4 5
    """
    if length % (2 * devices):
        return np.arange(length, dtype=np.int32).reshape(devices, -1)
    stretches = np.arange(length, dtype=np.int32).reshape(2 * devices, -1)
    return np.concatenate([stretches[:devices], stretches[: devices - 1 : -1]], axis=1)


def row_positions(length: int) -> jax.Array:
    """Return the positions `[T]` of this device's tokens in rows of `length`."""
    here = jax.lax.axis_index("context") if row_devices() > 1 else 0
    return jnp.asarray(zigzag_positions(length, row_devices()))[here]


def zigzag_split(batch: B) -> B:
    """Split rows by `zigzag_positions`, which `put_batch` placed in stretches, `[B T ...]`."""
    if row_devices() == 1:
        return batch

    def deal(x: jax.Array) -> jax.Array:
        row = _of_row(x.ndim).whole(x)
        return jnp.take(row, row_positions(row.shape[1]), axis=1)

    split: B = jax.tree.map(deal, batch)
    return split


def _of_row(dims: int, axes: Axes = ()) -> _Cut:
    return _Cut(axes or ("batch", "length", *(None,) * (dims - 2)), 1, ("context",))


def whole_rows(x: jax.Array, axes: Axes = ()) -> jax.Array:
    """Join `[B T ...]` of this device's tokens (`zigzag_split`) to whole rows, in order.

    `axes` name the dimensions of x, where others than its tokens may be cut.
    """
    n, slices = row_devices(), _of_row(x.ndim, axes)
    if n == 1:
        return x
    if jnp.issubdtype(x.dtype, jnp.floating):
        row = _all_gathered(x, None, slices, x.dtype, x.dtype)
    else:
        row = slices.whole(x)
    if row.shape[1] % (2 * n):
        return row
    pairs = row.reshape(x.shape[0], n, 2, -1, *x.shape[2:])
    in_order = jnp.concatenate([pairs[:, :, 0], jnp.flip(pairs[:, :, 1], axis=1)], axis=1)
    return in_order.reshape(row.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _all_gathered(
    w: jax.Array, gradient_sink: jax.Array | None, slices: _Cut, dtype: Any, stored_dtype: Any
) -> jax.Array:
    return slices.whole(w.astype(dtype))


def _all_gathered_forward(
    w: jax.Array, gradient_sink: jax.Array | None, *static: Any
) -> tuple[jax.Array, bool]:
    return _all_gathered(w, gradient_sink, *static), gradient_sink is None


def _all_gathered_backward(
    slices: _Cut, dtype: Any, stored_dtype: Any, stays: bool, d_w: jax.Array
) -> tuple[jax.Array | None, jax.Array | None]:
    mine = slices.summed(d_w)
    return (mine.astype(stored_dtype), None) if stays else (None, mine)


_all_gathered.defvjp(_all_gathered_forward, _all_gathered_backward)


def all_gathered(
    w: jax.Array,
    axes: Axes,
    shape: Sequence[int],
    dtype: Any,
    gradient_sink: jax.Array | None = None,
) -> jax.Array:
    """Gather a stored weight of `shape`, of which `w` may be a slice, whole and in `dtype`.

    Of experts side by side it is those of this device. The cast comes first so that the gather
    moves bytes of the computation's dtype. The gradient goes back the same way: reduce-scattered in
    compute dtype, then in the stored dtype. With `gradient_sink`, zeros like `w` in `dtype`, the
    gradient is that of the sink and stays as narrow as it came. Decoding has no gradient; there the
    compiler makes the whole.
    """
    mesh = in_context()
    if mesh is not None and not manual(mesh):
        others = [name for name in AXES if name not in RULES["embed"]]
        spec = partition_spec(axes, shape, mesh, only=others)
        whole: jax.Array = jax.lax.with_sharding_constraint(w.astype(dtype), spec)
        return whole
    if gradient_sink is not None:
        w = jax.lax.stop_gradient(w)
    return _all_gathered(w, gradient_sink, _cut(axes, shape), np.dtype(dtype), w.dtype)


@dataclass(frozen=True)
class Blocks:
    """A table of `width` "embed", gathered by blocks of entries, for a loss that streams them.

    The bytes that travel are of `dtype`.
    """

    axes: Axes
    width: int
    dtype: Any

    def gather(self, block: jax.Array) -> jax.Array:
        """Make entries of the table whole, of which a device may have its slice."""
        return all_gathered(block, self.axes, self._shape(block), self.dtype)

    def scatter(self, gradient: jax.Array) -> jax.Array:
        """Add up the gradient of whole entries over devices and return this device's slice."""
        slices = _cut(self.axes, self._shape(gradient))
        return slices.summed(gradient.astype(self.dtype)) if slices.over else gradient

    def _shape(self, block: jax.Array) -> tuple[int, ...]:
        sizes = zip(self.axes, block.shape, strict=True)
        return tuple(self.width if axis == "embed" else size for axis, size in sizes)


def sharded_lookup(table: jax.Array, ids: jax.Array, width: int, dtype: Any) -> jax.Array:
    """Look up `ids` `[B T]` in a table `[V width]` that may be sharded; `[B T width]`.

    A table cut along its width stays cut: every device looks up its columns for the tokens of its
    neighbours too, and they exchange them. That moves the tokens' bytes instead of the table's, and
    the gradient adds up where the slice lives, in the dtype it is stored in.
    """
    mesh, axes = in_context(), ("vocab", "embed")
    if mesh is not None and not manual(mesh):
        table = all_gathered(table, axes, (table.shape[0], width), table.dtype)
    over = cut("embed", width)
    exchange: tuple[str, ...] = ()
    for name in over:
        if exchange and width // jax.lax.axis_size((*exchange, name)) < LANES:
            break
        exchange = (*exchange, name)
    rest = _Cut(axes, 1, over[len(exchange) :])
    table = _all_gathered(table, None, rest, table.dtype, table.dtype)
    if not exchange:
        return _rows(table, ids[None], np.dtype(dtype))[0]
    every_ids = jax.lax.all_gather(ids, exchange)  # [n B T]
    columns = _rows(table, every_ids, np.dtype(dtype))  # [n B T width/n]
    mine = jax.lax.all_to_all(columns, exchange, split_axis=0, concat_axis=0, tiled=True)
    return jnp.moveaxis(mine, 0, 2).reshape(*ids.shape, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows(table: jax.Array, ids: jax.Array, dtype: Any) -> jax.Array:
    """Return `table[ids]`, `[n B T width]` in `dtype`."""
    return jnp.take(table, ids, axis=0, mode="clip").astype(dtype)


def _rows_forward(
    table: jax.Array, ids: jax.Array, dtype: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rows(table, ids, dtype), (table, ids)


def _rows_backward(
    dtype: Any, saved: tuple[jax.Array, jax.Array], d_rows: jax.Array
) -> tuple[jax.Array, None]:
    # One n after the other: a TPU sorts what it adds up, and its compiler takes minutes over the
    # sort of a hundred thousand ids.
    table, ids = saved

    def add(d_table: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        at, more = part
        return d_table.at[at].add(more.astype(d_table.dtype), mode="clip"), None

    return jax.lax.scan(add, jnp.zeros_like(table), (ids, d_rows))[0], None


_rows.defvjp(_rows_forward, _rows_backward)


def summed(grads: Any, axes: Any, shapes: Any) -> Any:
    """Add up the gradients of slices over the devices that hold the same slice."""
    mesh = in_context()
    if mesh is None:
        return grads
    own = [name for name in manual(mesh) if mesh.shape[name] > 1 and name in MANUAL]

    def add(_: str, grad: jax.Array, names: Axes, like: Any) -> jax.Array:
        split_over = {name for over in cuts(names, like.shape, mesh, own) for name in over}
        over = tuple(name for name in own if name not in split_over)
        if not over:
            return grad
        return _beside(lambda grad: jax.lax.psum(grad, over), grad, names)

    return map_named(add, grads, axes, shapes)


def total(tree: Sums) -> Sums:
    """Numbers of each device's own tokens, added up over all of them; as they are elsewhere."""
    mesh = in_context()
    own = () if mesh is None else tuple(name for name in manual(mesh) if name in MANUAL)
    summed: Sums = jax.lax.psum(tree, own) if own else tree
    return summed


def _words(key: jax.Array, rows: int, length: int) -> jax.Array:
    """Draw two random words, uint32, for each token: `[B T 2]`."""
    numbers, tokens = jnp.arange(rows), row_positions(length * row_devices())
    mesh = in_context()
    if mesh is not None and manual(mesh):
        numbers = numbers + rows * jax.lax.axis_index(ROWS)

    def of_row(row: jax.Array) -> jax.Array:
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, row)))(tokens)
        return jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys)

    return jax.vmap(of_row)(numbers)


def bits(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """32 random bits, uint32, for each number of `[B T ...]`.

    They go by the token's row and place in the whole batch, so that what is drawn does not depend
    on the devices the batch lies on. JAX's generator gives two words to each token, and these are
    mixed with the number's place in it as MurmurHash3 finishes its hashes. By a TPU's schedule that
    is hidden behind reading the numbers that are dropped; JAX's generator for each of them was a
    seventh of an adapter step.
    """
    seeds = _words(key, shape[0], shape[1])
    one, two = (
        jnp.broadcast_to(seeds[..., n].reshape(*shape[:2], *[1] * len(shape[2:])), shape)
        for n in range(2)
    )
    place = jnp.arange(math.prod(shape[2:]), dtype=jnp.uint32).reshape(1, 1, *shape[2:])
    mixed: jax.Array = one + jnp.broadcast_to(place, shape) * jnp.uint32(0x9E3779B9)
    mixed = (mixed ^ mixed >> 16) * jnp.uint32(0x85EBCA6B) + two
    mixed = (mixed ^ mixed >> 13) * jnp.uint32(0xC2B2AE35)
    return mixed ^ mixed >> 16
