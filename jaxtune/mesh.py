"""Who holds which slice: the mesh, one table from logical axes to mesh axes, host -> device.

A weight or an activation says what its dimensions mean ("embed", "heads"); `RULES` says where that
meaning lives. Nobody else writes a `PartitionSpec`. The mesh always has all axes, of size 1 when
unused, so CPU, GPU and TPU run the same program.

Training and evaluation run under `per_device`: one function on every device's own rows, tokens and
slices of weights. There a weight is `gathered` where it is used and its gradient reduce-scattered,
by collectives that stand in the code. What is cut over `tensor` is left to the compiler, guided by
`constrain`; so is everything outside of `per_device`: decoding, and the optimiser.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtune.config import ConfigError
from jaxtune.tree import map_named

SIZES = ("data", "fsdp", "tensor", "context")  # what a config gives the sizes of
# `fsdp` is one mesh axis per dimension of the torus it lies on: a reduce-scatter along one
# dimension is native to the network, one over a plane compiles to an all-reduce of the whole.
FSDP = ("fsdp", "fsdp_y", "fsdp_z")
AXES = ("data", *FSDP, "tensor", "context")
ROWS = ("data", *FSDP)  # the mesh axes that rows of the batch are spread over
MANUAL = (*ROWS, "context")  # each device's own inside of `per_device`

# Logical axis -> mesh axes. Parameters first, then activations.
RULES: Mapping[str | None, tuple[str, ...]] = {
    "layers": (),
    "embed": (*FSDP, "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": (),
    "norm": (),
    "batch": ROWS,
    "length": ("context",),
    "act_embed": (),
    None: (),
}

Axes = tuple[str | None, ...]
B = TypeVar("B")  # a NamedTuple of arrays [B T]


def make_mesh(
    sizes: Mapping[str, int],
    devices: Sequence[jax.Device] | None = None,
    *,
    torus: tuple[int, ...] | None = None,
) -> Mesh:
    """A mesh over all devices; one of the `SIZES` may be -1 and takes what is left.

    `torus` says how `fsdp` is laid over dimensions of the network; without it the devices'
    coordinates do. Several slices are joined along `data`, the one axis that crosses the
    data-centre network.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = [sizes[axis] for axis in SIZES]
    rest = math.prod(size for size in shape if size != -1)
    if -1 in shape and len(devices) % rest == 0:
        shape[shape.index(-1)] = len(devices) // rest
    if math.prod(shape) != len(devices):
        asked = " x ".join(f"{axis}={size}" for axis, size in zip(SIZES, shape, strict=True))
        product = "" if -1 in shape else f" (={math.prod(shape)})"
        raise ConfigError(
            f"mesh: {len(devices)} devices cannot be {asked}{product}. "
            f"Choose sizes whose product is {len(devices)}; one axis may be -1."
        )
    grid = _grid(shape, devices)
    along = _torus(grid[0, :, 0, 0]) if torus is None else torus
    split = (*along, *[1] * (len(FSDP) - len(along)))
    grid = grid.reshape(shape[0], *split, *shape[2:])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _grid(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices by `SIZES`: rows of the network's grid one after the other, slice by slice."""
    slices = sorted({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % len(slices):
        raise ConfigError(
            f"mesh: data={shape[0]} over {len(slices)} slices. Slices are joined along data: "
            f"choose data={len(slices)} or a multiple of it."
        )
    order = sorted(range(len(devices)), key=lambda n: (_place(devices[n]), n))
    grid = np.empty(len(devices), object)
    grid[:] = [devices[n] for n in order]
    return grid.reshape(shape)


def _place(device: Any) -> tuple[int, ...]:
    """Slice, coordinates in it, and the core of the chip; alike for all where there is no grid."""
    core = getattr(device, "core_on_chip", 0)
    return getattr(device, "slice_index", 0), *getattr(device, "coords", ()), core


def _torus(line: Iterable[Any]) -> tuple[int, ...]:
    """How a line of devices lies on the network, major dimension first; (n,) where unknown."""
    places = [_place(device) for device in line]
    count, sizes = len(places), list[int]()
    while len(places) > 1:
        moved = [[n for n, at in enumerate(place) if at != places[0][n]] for place in places[1:]]
        along = moved[0]
        run = 1 + sum(1 for _ in itertools.takewhile(along.__eq__, moved))
        if len(along) != 1 or len(places) % run:
            return (count,)
        sizes.insert(0, run)
        places = places[::run]
    # The cores of a chip are the minor dimension; they go with the next one where there are many.
    kept = len(FSDP) - 1
    return tuple(sizes) if len(sizes) <= len(FSDP) else (*sizes[:kept], math.prod(sizes[kept:]))


def platform_of(mesh: Mesh) -> str:
    """Of the devices a program is for, which need not be those of this machine."""
    return str(mesh.devices.flat[0].platform)


def sizes_of(mesh: Mesh) -> dict[str, int]:
    """The sizes of the axes as a config names them."""
    fsdp = math.prod(mesh.shape[axis] for axis in FSDP)
    return {axis: fsdp if axis == "fsdp" else mesh.shape[axis] for axis in SIZES}


def row_shards(mesh: Mesh) -> int:
    """How many ways the rows of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def partition_spec(
    axes: Axes, shape: Sequence[int], mesh: Any, *, only: Sequence[str] = AXES
) -> PartitionSpec:
    """Logical axes of one array -> its spec; a dimension that does not divide is replicated.

    `only` are the mesh axes that count.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} logical axes {axes} for shape {tuple(shape)}")
    entries: list[Any] = []
    for axis, size in zip(axes, shape, strict=True):
        names = _cut_over(axis, size, mesh, only)
        entries.append(None if not names else names[0] if len(names) == 1 else names)
    return PartitionSpec(*entries)


def _cut_over(axis: str | None, size: int, mesh: Any, only: Sequence[str]) -> tuple[str, ...]:
    names = [name for name in RULES[axis] if name in only and mesh.shape[name] > 1]
    while names and size % math.prod(mesh.shape[name] for name in names):
        names.pop()
    return tuple(names)


def shardings(axes_tree: Any, abstract_tree: Any, mesh: Mesh) -> Any:
    """Trees of logical axes and of shapes -> tree of `NamedSharding`."""
    return map_named(
        lambda _, leaf, axes: NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh)),
        abstract_tree,
        axes_tree,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _mesh_in_context() -> Any | None:
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def _manual(mesh: Any) -> tuple[str, ...]:
    """The axes that are each device's own here: none outside of `per_device`."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Manual)


def _automatic(mesh: Any) -> tuple[str, ...]:
    return tuple(name for name in mesh.axis_names if name not in _manual(mesh))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation by logical names; the identity without a mesh (`jax.set_mesh`)."""
    mesh = _mesh_in_context()
    if mesh is None:
        return x
    free = _automatic(mesh)
    spec = partition_spec(axes, x.shape, mesh, only=free)
    return jax.lax.with_sharding_constraint(x, spec) if free else x


def spread(axis: str, size: int) -> tuple[str, ...]:
    """The mesh axes that a dimension of `size` and this logical axis is cut along, for `local`."""
    mesh = _mesh_in_context()
    return () if mesh is None else _cut_over(axis, size, mesh, _automatic(mesh))


def parts(axis: str, size: int) -> int:
    """How many pieces `spread` cuts such a dimension into."""
    mesh = _mesh_in_context()
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in spread(axis, size))


def local(
    f: Callable[..., jax.Array],
    args: Sequence[jax.Array | None],
    axes: Sequence[Axes],
    out: Axes,
    *,
    kernel: bool = False,
) -> jax.Array:
    """`f(*args)` on every device for its own slices; with no mesh, plainly `f(*args)`.

    `axes` name the dimensions of each argument, `out` those of the result, which has the shape of
    the first argument. For what the compiler cannot cut by itself, as sorting each device's own
    tokens; `f` adds up over `spread(...)`, asked for outside of it, what only the slices together
    are. `kernel`: `f` holds one that JAX cannot follow, and adds nothing up.
    """
    mesh = _mesh_in_context()
    free = () if mesh is None else _automatic(mesh)
    if mesh is None or not free:
        return f(*args)
    shapes = [x.shape for x in args if x is not None]
    specs = tuple(
        None if x is None else partition_spec(names, x.shape, mesh, only=free)
        for x, names in zip(args, axes, strict=True)
    )
    result = partition_spec(out, shapes[0], mesh, only=free)
    whole = len(free) == len(mesh.axis_names) and not kernel
    return jax.shard_map(
        f, in_specs=specs, out_specs=result, axis_names=frozenset(free), check_vma=whole
    )(*args)


# -- one function on every device ----------------------------------------------------------------


def per_device(f: Callable[..., Any], mesh: Mesh, given: Sequence[Any], made: Any) -> Any:
    """`f` as it runs on every device, for that device's own rows, tokens and slices of weights.

    `given` are the specs of its arguments, `made` those of its result: `slices`, `tokens`, or
    `EVERYWHERE`. Inside, `gathered` makes weights whole; a gradient is of the SUM of what all
    devices return, so nothing is added up before `summed` and `total`. Axes of size 1 are each
    device's own too, so that a kernel finds none that the compiler would have to cut.
    """
    own = frozenset(name for name in AXES if name in MANUAL or mesh.shape[name] == 1)
    return jax.shard_map(
        f, mesh=mesh, in_specs=tuple(given), out_specs=made, axis_names=own, check_vma=False
    )


EVERYWHERE = PartitionSpec()


def slices(axes: Any, tree: Any, mesh: Mesh) -> Any:
    """Specs, for `per_device`, of a tree of weights with these logical axes."""
    return map_named(
        lambda _, leaf, names: partition_spec(names, leaf.shape, mesh, only=MANUAL), tree, axes
    )


def tokens(shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """The spec, for `per_device`, of arrays `[B T]`; ValueError where they do not divide."""
    sizes = row_shards(mesh), mesh.shape["context"]
    if shape[0] % sizes[0] or shape[1] % sizes[1]:
        raise ValueError(
            f"a batch of {shape[0]} rows x {shape[1]} tokens does not divide over {sizes[0]} "
            f"devices along {' and '.join(SIZES[:2])} and {sizes[1]} along context"
        )
    return PartitionSpec(ROWS, "context")


def cut(axis: str | None, size: int) -> tuple[str, ...]:
    """The mesh axes over which each device has its own slice of a dimension of `size`."""
    mesh = _mesh_in_context()
    return () if mesh is None else _cut_over(axis, size, mesh, _manual(mesh))


def _beside(f: Callable[[jax.Array], jax.Array], x: jax.Array, axes: Axes) -> jax.Array:
    """`f(x)`, a collective along axes that are each device's own, on the slices that `x` has along
    the automatic ones: left to itself the compiler makes those whole first."""
    mesh = _mesh_in_context()
    free = () if mesh is None else _automatic(mesh)
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
        """All slices, joined."""
        if not self.over:
            return x
        join = functools.partial(jax.lax.all_gather, axis_name=self.over, axis=self.dim, tiled=True)
        return _beside(join, x, self.axes)

    def summed(self, x: jax.Array) -> jax.Array:
        """The inverse: `x` added up over the devices, of which each gets its slice."""

        def scatter(x: jax.Array) -> jax.Array:
            for name in self.over:
                x = jax.lax.psum_scatter(x, name, scatter_dimension=self.dim, tiled=True)
            return x

        return _beside(scatter, x, self.axes) if self.over else x


def _cut(axes: Axes, shape: Sequence[int]) -> _Cut:
    """Of an array of `shape` in all; no weight has two dimensions of each device's own."""
    found = [(dim, over) for dim, axis in enumerate(axes) if (over := cut(axis, shape[dim]))]
    return _Cut(axes, *(found[0] if found else (0, ())))


def row_devices() -> int:
    """Over how many devices, here, the tokens of a row are cut: 1 outside of `per_device`."""
    mesh = _mesh_in_context()
    return 1 if mesh is None or "context" not in _manual(mesh) else mesh.shape["context"]


def shares(length: int, devices: int) -> np.ndarray:
    """Which tokens of a row each device has for its own, int32 `[devices length/devices]`.

    Under a causal mask a token costs as much as stands before it, so a device has a stretch from
    the front and the one as far from the back: all cost the same. Plain stretches, where the row
    does not divide into two for each device.

        shares(8, 2)  ->  0 1 6 7
                          2 3 4 5
    """
    if length % (2 * devices):
        return np.arange(length, dtype=np.int32).reshape(devices, -1)
    stretches = np.arange(length, dtype=np.int32).reshape(2 * devices, -1)
    return np.concatenate([stretches[:devices], stretches[: devices - 1 : -1]], axis=1)


def row_share(length: int) -> jax.Array:
    """`shares` of this device: the places `[T]` of its tokens in rows of `length`."""
    here = jax.lax.axis_index("context") if row_devices() > 1 else 0
    return jnp.asarray(shares(length, row_devices()))[here]


def dealt(batch: B) -> B:
    """A batch of arrays `[B T ...]` as `put_batch` placed it, T in stretches, dealt by `shares`."""
    if row_devices() == 1:
        return batch

    def deal(x: jax.Array) -> jax.Array:
        row = _of_row(x.ndim).whole(x)
        return jnp.take(row, row_share(row.shape[1]), axis=1)

    return jax.tree.map(deal, batch)


def _of_row(dims: int, axes: Axes = ()) -> _Cut:
    return _Cut(axes or ("batch", "length", *(None,) * (dims - 2)), 1, ("context",))


def whole_rows(x: jax.Array, axes: Axes = ()) -> jax.Array:
    """`[B T ...]` of this device's tokens, as `dealt` -> of all tokens of its rows, in order.

    `axes` name the dimensions of x, where others than its tokens may be cut.
    """
    n, slices = row_devices(), _of_row(x.ndim, axes)
    if n == 1:
        return x
    if jnp.issubdtype(x.dtype, jnp.floating):
        row = _gathered(x, None, slices, x.dtype, x.dtype)
    else:
        row = slices.whole(x)
    if row.shape[1] % (2 * n):
        return row
    pairs = row.reshape(x.shape[0], n, 2, -1, *x.shape[2:])
    in_order = jnp.concatenate([pairs[:, :, 0], jnp.flip(pairs[:, :, 1], axis=1)], axis=1)
    return in_order.reshape(row.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _gathered(
    w: jax.Array, arriving: jax.Array | None, slices: _Cut, dtype: Any, stored_dtype: Any
) -> jax.Array:
    return slices.whole(w.astype(dtype))


def _gathered_forward(
    w: jax.Array, arriving: jax.Array | None, *static: Any
) -> tuple[jax.Array, bool]:
    return _gathered(w, arriving, *static), arriving is None


def _gathered_backward(
    slices: _Cut, dtype: Any, stored_dtype: Any, stays: bool, d_w: jax.Array
) -> tuple[jax.Array | None, jax.Array | None]:
    mine = slices.summed(d_w)
    return (mine.astype(stored_dtype), None) if stays else (None, mine)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def gathered(
    w: jax.Array,
    axes: Axes,
    shape: Sequence[int],
    dtype: Any,
    arriving: jax.Array | None = None,
) -> jax.Array:
    """A stored weight of `shape`, of which `w` may be a slice, whole and in `dtype`.

    The cast comes first so that the gather moves bytes of the computation's dtype. The gradient
    goes back the same way: reduce-scattered in compute dtype, then in the stored dtype. Given
    `arriving`, zeros like `w` in `dtype`, the gradient is that of `arriving` and stays as narrow as
    it came. Decoding has no gradient; there the compiler is asked for the whole.
    """
    mesh = _mesh_in_context()
    if mesh is not None and not _manual(mesh):
        others = [name for name in AXES if name not in RULES["embed"]]
        spec = partition_spec(axes, shape, mesh, only=others)
        return jax.lax.with_sharding_constraint(w.astype(dtype), spec)
    if arriving is not None:
        w = jax.lax.stop_gradient(w)
    return _gathered(w, arriving, _cut(axes, shape), np.dtype(dtype), w.dtype)


@dataclass(frozen=True)
class Blocks:
    """Blocks of a table of some `width` "embed", any number of entries at a time; for a loss that
    streams them. The bytes that travel are of `dtype`."""

    axes: Axes
    width: int
    dtype: Any

    def gather(self, block: jax.Array) -> jax.Array:
        """Entries of the table as stored, of which a device may have its slice -> whole."""
        return gathered(block, self.axes, self._shape(block), self.dtype)

    def scatter(self, gradient: jax.Array) -> jax.Array:
        """The gradient of whole entries, added up over devices -> this device's slice."""
        slices = _cut(self.axes, self._shape(gradient))
        return slices.summed(gradient.astype(self.dtype)) if slices.over else gradient

    def _shape(self, block: jax.Array) -> tuple[int, ...]:
        sizes = zip(self.axes, block.shape, strict=True)
        return tuple(self.width if axis == "embed" else size for axis, size in sizes)


LANES = 128  # a slice of a table's rows is not cut narrower than a vector of the TPU


def looked_up(table: jax.Array, ids: jax.Array, width: int, dtype: Any) -> jax.Array:
    """Rows `ids` `[B T]` of a table `[V width]`, of which `table` may be a slice -> `[B T width]`.

    A table cut along its width stays cut: every device looks up its columns for the tokens of its
    neighbours too, and they trade. That moves the tokens' bytes instead of the table's, and the
    gradient adds up where the slice lives, in the dtype it is stored in.
    """
    mesh, axes = _mesh_in_context(), ("vocab", "embed")
    if mesh is not None and not _manual(mesh):
        table = gathered(table, axes, (table.shape[0], width), table.dtype)
    over = cut("embed", width)
    trade: tuple[str, ...] = ()
    for name in over:
        if trade and width // jax.lax.axis_size((*trade, name)) < LANES:
            break
        trade = (*trade, name)
    rest = _Cut(axes, 1, over[len(trade) :])
    table = _gathered(table, None, rest, table.dtype, table.dtype)
    if not trade:
        return _rows(table, ids[None], np.dtype(dtype))[0]
    asked = jax.lax.all_gather(ids, trade)  # [n B T]
    found = _rows(table, asked, np.dtype(dtype))  # [n B T width/n]
    mine = jax.lax.all_to_all(found, trade, split_axis=0, concat_axis=0, tiled=True)
    return jnp.moveaxis(mine, 0, 2).reshape(*ids.shape, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows(table: jax.Array, ids: jax.Array, dtype: Any) -> jax.Array:
    """`table[ids]` `[n B T width]` in `dtype`."""
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
    """Gradients of slices as `per_device` leaves them, each added up over the devices that hold
    the same slice."""
    mesh = _mesh_in_context()
    if mesh is None:
        return grads
    own = [name for name in _manual(mesh) if mesh.shape[name] > 1 and name in MANUAL]

    def add(_: str, grad: jax.Array, names: Axes, like: Any) -> jax.Array:
        kept = {name for axis, size in zip(names, like.shape, strict=True)
                for name in _cut_over(axis, size, mesh, own)}  # fmt: skip
        over = tuple(name for name in own if name not in kept)
        if not over:
            return grad
        return _beside(lambda grad: jax.lax.psum(grad, over), grad, names)

    return map_named(add, grads, axes, shapes)


def total(tree: Any) -> Any:
    """Numbers of each device's own tokens, added up over all of them; as they are elsewhere."""
    mesh = _mesh_in_context()
    own = () if mesh is None else tuple(name for name in _manual(mesh) if name in MANUAL)
    return jax.lax.psum(tree, own) if own else tree


def draws(
    draw: Callable[[jax.Array, tuple[int, ...]], jax.Array], key: jax.Array, shape: Sequence[int]
) -> jax.Array:
    """`draw(key of a token, shape[2:])` for all tokens of `[B T ...]`.

    The key is of the token's row and place in the whole batch, so that what is drawn does not
    depend on the devices the batch lies on.
    """
    rows, tokens = jnp.arange(shape[0]), row_share(shape[1] * row_devices())
    mesh = _mesh_in_context()
    if mesh is not None and _manual(mesh):
        rows = rows + shape[0] * jax.lax.axis_index(ROWS)

    def of_row(row: jax.Array) -> jax.Array:
        key_of_row = jax.random.fold_in(key, row)
        return jax.vmap(lambda token: draw(jax.random.fold_in(key_of_row, token), rest))(tokens)

    rest = tuple(shape[2:])
    return jax.vmap(of_row)(rows)


# -- host to device --------------------------------------------------------------------------------


def put_batch(rows: Callable[[int, int], B], *, batch_size: int, length: int, mesh: Mesh) -> B:
    """The one host -> device copy: `rows(lo, hi)` gives rows [lo, hi) of the global batch.

    Every host asks only for the rows its devices hold. Arrays are [batch_size length], rows over
    `data` and `fsdp`, tokens over `context`.
    """
    shape = (batch_size, length)
    sharding = NamedSharding(mesh, partition_spec(("batch", "length"), shape, mesh))
    held = [
        _bounds(index, batch_size)
        for index in sharding.addressable_devices_indices_map(shape).values()
    ]
    lo, hi = min(start for start, _ in held), max(stop for _, stop in held)
    local = rows(lo, hi)

    def array(values: np.ndarray) -> jax.Array:
        def slice_of(index: tuple[slice, ...] | None) -> np.ndarray:
            start, stop = _bounds(index, batch_size)
            return values[start - lo : stop - lo, index[1] if index else slice(None)]

        return jax.make_array_from_callback(shape, sharding, slice_of)

    return type(local)(*(array(values) for values in local))  # type: ignore[attr-defined]


def _bounds(index: tuple[slice, ...] | None, rows: int) -> tuple[int, int]:
    start, stop, _ = (index[0] if index else slice(None)).indices(rows)
    return start, stop
