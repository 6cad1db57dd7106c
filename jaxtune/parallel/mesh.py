"""The mesh: one table from logical axes to mesh axes, and the copy from host to device.

A weight or an activation says what its dimensions mean ("embed", "heads"); `RULES` says where that
meaning lives. Nobody else writes a `PartitionSpec`. The mesh always has all axes, of size 1 when
unused, so CPU, GPU and TPU run the same program.

What devices do together inside of a training step is written in `collectives`. Outside of it, in
decoding and in the optimiser, the compiler decides, guided by `constrain`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtune.config import ConfigError
from jaxtune.tree import map_named

SIZES = ("data", "fsdp", "expert", "tensor", "context")  # what a config gives the sizes of
# `fsdp` is one mesh axis per dimension of the torus it lies on: a reduce-scatter along one
# dimension is native to the network, one over a plane compiles to an all-reduce of the whole.
FSDP = ("fsdp", "fsdp_y", "fsdp_z")
AXES = ("data", *FSDP, "expert", "tensor", "context")
ROWS = ("data", *FSDP, "expert")  # the mesh axes that rows of the batch are spread over
MANUAL = (*ROWS, "context")  # each device's own inside of a training step

# Logical axis -> mesh axes. Parameters first, then activations. What a dimension further in front
# of an array has taken, the others do without: of experts side by side `[E D F]` the mesh axis
# "expert" cuts E, of any other weight its D.
RULES: Mapping[str | None, tuple[str, ...]] = {
    "layers": (),
    "embed": (*FSDP, "expert", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
    "scores": (),
    "norm": (),
    "batch": ROWS,
    "length": ("context",),
    "act_embed": (),
    None: (),
}

Axes = tuple[str | None, ...]
TILE = 16  # rows of a matrix that lie together in a TPU's memory, where they are bfloat16
B = TypeVar("B")  # a NamedTuple of arrays [B T]


def make_mesh(
    sizes: Mapping[str, int],
    devices: Sequence[jax.Device] | None = None,
    *,
    torus: tuple[int, ...] | None = None,
) -> Mesh:
    """A mesh over all devices; one of the `SIZES` may be -1 and takes what is left, and one that
    is not given is 1.

    `torus` says how `fsdp` is laid over dimensions of the network; without it the devices'
    coordinates do. Several slices are joined along `data`, the one axis that crosses the
    data-centre network.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = [sizes.get(axis, 1) for axis in SIZES]
    rest = math.prod(size for size in shape if size != -1)
    if -1 in shape and len(devices) % rest == 0:
        shape[shape.index(-1)] = len(devices) // rest
    if math.prod(shape) != len(devices):
        requested = " x ".join(f"{axis}={size}" for axis, size in zip(SIZES, shape, strict=True))
        product = "" if -1 in shape else f" (={math.prod(shape)})"
        raise ConfigError(
            f"mesh: {len(devices)} devices cannot be {requested}{product}. "
            f"Choose sizes whose product is {len(devices)}; one axis may be -1."
        )
    grid = _grid(shape, devices)
    along = _torus(grid[0, :, 0, 0, 0]) if torus is None else torus
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
    """Return slice, coordinates and core of the chip; alike for all without a grid."""
    core = getattr(device, "core_on_chip", 0)
    return getattr(device, "slice_index", 0), *getattr(device, "coords", ()), core


def _torus(line: Iterable[Any]) -> tuple[int, ...]:
    """Find how a line of devices lies on the network, major first; (n,) where unknown."""
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
    last = len(FSDP) - 1
    return tuple(sizes) if len(sizes) <= len(FSDP) else (*sizes[:last], math.prod(sizes[last:]))


def platform_of(mesh: Mesh) -> str:
    """Name the platform of a program's devices, which need not be of this machine."""
    return str(mesh.devices.flat[0].platform)


def sizes_of(mesh: Mesh) -> dict[str, int]:
    """Return the sizes of the axes as a config names them."""
    fsdp = math.prod(mesh.shape[axis] for axis in FSDP)
    return {axis: fsdp if axis == "fsdp" else mesh.shape[axis] for axis in SIZES}


def row_shards(mesh: Mesh) -> int:
    """Count the devices over which the rows of a batch are sharded."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def check_experts(experts: int, mesh: Mesh) -> None:
    """Raise `ConfigError` where the axis `expert` is used by a model whose mixtures have other
    `experts` than it divides, or none: 0."""
    shards = mesh.shape["expert"]
    if shards > 1 and experts == 0:
        raise ConfigError(
            f"mesh.expert: {shards} devices would share a mixture's experts, and this model has "
            "none. Leave mesh.expert at 1; mesh.fsdp spreads its parameters."
        )
    if experts % shards:
        fitting = ", ".join(str(n) for n in range(2, experts + 1) if experts % n == 0)
        raise ConfigError(
            f"mesh.expert: {experts} experts do not divide over {shards} devices. "
            f"Choose one of {fitting}, or 1."
        )


def partition_spec(
    axes: Axes, shape: Sequence[int], mesh: Any, *, only: Sequence[str] = AXES
) -> PartitionSpec:
    """Map logical axes of an array to its spec; a dimension that does not divide is replicated.

    `only` are the mesh axes that count.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} logical axes {axes} for shape {tuple(shape)}")
    entries: list[Any] = []
    for names in cuts(axes, shape, mesh, only):
        entries.append(None if not names else names[0] if len(names) == 1 else names)
    return PartitionSpec(*entries)


def cuts(axes: Axes, shape: Sequence[int], mesh: Any, only: Sequence[str]) -> list[tuple[str, ...]]:
    """List the mesh axes that cut each dimension of an array; none of them cuts two."""
    over: list[tuple[str, ...]] = []
    for axis, size in zip(axes, shape, strict=True):
        free = set(only).difference(*over)
        over.append(cut_over(axis, size, mesh, free))
    return _on_tiles(axes, shape, over, mesh)


def _on_tiles(
    axes: Axes, shape: Sequence[int], over: list[tuple[str, ...]], mesh: Any
) -> list[tuple[str, ...]]:
    """Cut "mlp" in place of "embed" where slices of "embed" end inside of a `TILE`.

    Those of "mlp" must not: what is gathered would be copied into place once more. Not beside
    `tensor`, which cuts "mlp" itself.
    """
    if mesh.shape["tensor"] > 1 or not {"embed", "mlp"} <= set(axes):
        return over
    narrow, wide = axes.index("embed"), axes.index("mlp")
    shards = math.prod(mesh.shape[name] for name in over[narrow])
    if shape[narrow] // shards % TILE and shape[wide] % (shards * TILE) == 0:
        over[narrow], over[wide] = (), over[narrow]
    return over


def cut_over(axis: str | None, size: int, mesh: Any, only: Iterable[str]) -> tuple[str, ...]:
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


def in_context() -> Any | None:
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def manual(mesh: Any) -> tuple[str, ...]:
    """List the axes that are each device's own here: none outside of a training step."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Manual)


def automatic(mesh: Any) -> tuple[str, ...]:
    return tuple(name for name in mesh.axis_names if name not in manual(mesh))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation by logical names; the identity without a mesh (`jax.set_mesh`)."""
    mesh = in_context()
    if mesh is None:
        return x
    free = automatic(mesh)
    spec = partition_spec(axes, x.shape, mesh, only=free)
    return jax.lax.with_sharding_constraint(x, spec) if free else x


def spread(axis: str, size: int) -> tuple[str, ...]:
    """List the mesh axes that cut a dimension of `size` and this logical axis, for `local`."""
    mesh = in_context()
    return () if mesh is None else cut_over(axis, size, mesh, automatic(mesh))


def parts(axis: str, size: int) -> int:
    """Count the pieces into which `spread` cuts such a dimension."""
    mesh = in_context()
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in spread(axis, size))


def local(
    f: Callable[..., jax.Array],
    args: Sequence[jax.Array | None],
    axes: Sequence[Axes],
    out: Axes,
    *,
    kernel: bool = False,
) -> jax.Array:
    """Call `f(*args)` on every device for its own slices; with no mesh, plainly.

    `axes` name the dimensions of each argument, `out` those of the result, which has the shape of
    the first argument. For what the compiler cannot cut by itself, as sorting each device's own
    tokens; `f` adds up over `spread(...)`, asked for outside of it, what only the slices together
    are. `kernel`: `f` holds one that JAX cannot follow, and adds nothing up.
    """
    mesh = in_context()
    free = () if mesh is None else automatic(mesh)
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


# -- host to device --------------------------------------------------------------------------------


def put_batch(rows: Callable[[int, int], B], *, batch_size: int, length: int, mesh: Mesh) -> B:
    """Copy a batch from host to device: `rows(lo, hi)` gives rows [lo, hi) of the global batch.

    Every host asks only for the rows its devices hold. Arrays are [batch_size length], rows over
    `data`, `fsdp` and `expert`, tokens over `context`.
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


def put(values: np.ndarray, sharding: Any) -> jax.Array:
    """An array that every host has, as one global array: each host makes the slices of its devices.

    `jax.device_put` would gather it whole from every host first, to compare.
    """
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def _bounds(index: tuple[slice, ...] | None, rows: int) -> tuple[int, int]:
    start, stop, _ = (index[0] if index else slice(None)).indices(rows)
    return start, stop
