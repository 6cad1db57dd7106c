"""Who holds which slice: the mesh, one table from logical axes to mesh axes, host -> device.

A weight or an activation says what its dimensions mean ("embed", "heads"); `RULES` says where that
meaning lives. Nobody else writes a `PartitionSpec`. The mesh always has all four axes, of size 1
when unused, so CPU, GPU and TPU run the same program.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtune.config import ConfigError
from jaxtune.tree import map_named

AXES = ("data", "fsdp", "tensor", "context")
ROWS = ("data", "fsdp")  # the mesh axes that rows of the batch are spread over

# Logical axis -> mesh axes. Parameters first, then activations.
RULES: Mapping[str | None, tuple[str, ...]] = {
    "layers": (),
    "embed": ("fsdp",),
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


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices; one size may be -1 and takes what is left."""
    devices = jax.devices() if devices is None else list(devices)
    shape = [sizes[axis] for axis in AXES]
    rest = math.prod(size for size in shape if size != -1)
    if -1 in shape and len(devices) % rest == 0:
        shape[shape.index(-1)] = len(devices) // rest
    if math.prod(shape) != len(devices):
        asked = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
        product = "" if -1 in shape else f" (={math.prod(shape)})"
        raise ConfigError(
            f"mesh: {len(devices)} devices cannot be {asked}{product}. "
            f"Choose sizes whose product is {len(devices)}; one axis may be -1."
        )
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(shape), AXES, axis_types=kinds, devices=devices)


def platform_of(mesh: Mesh) -> str:
    """Of the devices a program is for, which need not be those of this machine."""
    return str(mesh.devices.flat[0].platform)


def row_shards(mesh: Mesh) -> int:
    """How many ways the rows of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def partition_spec(
    axes: Axes, shape: Sequence[int], mesh: Any, *, without: str | None = None
) -> PartitionSpec:
    """Logical axes of one array -> its spec; a dimension that does not divide is replicated.

    `without` leaves one mesh axis out: `without="fsdp"` is the weight as a layer uses it.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} logical axes {axes} for shape {tuple(shape)}")
    entries: list[Any] = []
    for axis, size in zip(axes, shape, strict=True):
        names = [n for n in RULES[axis] if n != without and mesh.shape[n] > 1]
        while names and size % math.prod(mesh.shape[n] for n in names):
            names.pop()
        entries.append(None if not names else names[0] if len(names) == 1 else tuple(names))
    return PartitionSpec(*entries)


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


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation by logical names; the identity without a mesh (`jax.set_mesh`)."""
    mesh = _mesh_in_context()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))


def spread(axis: str, size: int) -> tuple[str, ...]:
    """The mesh axes that a dimension of `size` and this logical axis is cut along, for `local`."""
    mesh = _mesh_in_context()
    entry = None if mesh is None else partition_spec((axis,), (size,), mesh)[0]
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


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
    tokens; `f` adds up over `spread(...)` what only the slices together are. `kernel`: `f` holds
    one that JAX cannot follow, and adds nothing up.
    """
    mesh = _mesh_in_context()
    if mesh is None:
        return f(*args)
    shapes = [x.shape for x in args if x is not None]
    specs = tuple(
        None if x is None else partition_spec(names, x.shape, mesh)
        for x, names in zip(args, axes, strict=True)
    )
    result = partition_spec(out, shapes[0], mesh)
    return jax.shard_map(f, in_specs=specs, out_specs=result, check_vma=not kernel)(*args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(w: jax.Array, axes: Axes, dtype: Any, stored_dtype: Any) -> jax.Array:
    w = w.astype(dtype)
    mesh = _mesh_in_context()
    if mesh is None:
        return w
    return jax.lax.with_sharding_constraint(w, partition_spec(axes, w.shape, mesh, without="fsdp"))


def _gathered_forward(
    w: jax.Array, axes: Axes, dtype: Any, stored_dtype: Any
) -> tuple[jax.Array, None]:
    return _gathered(w, axes, dtype, stored_dtype), None


def _gathered_backward(
    axes: Axes, dtype: Any, stored_dtype: Any, residual: None, cotangent: jax.Array
) -> tuple[jax.Array]:
    # Asking for the stored sharding is what lets the compiler reduce-scatter the gradient.
    return (constrain(cotangent, *axes).astype(stored_dtype),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def gathered(w: jax.Array, axes: Axes, dtype: Any) -> jax.Array:
    """A stored weight made ready for use: cast, then gathered over `fsdp`.

    The cast comes first so that the gather moves compute-dtype bytes. The gradient goes back the
    same way: scattered over `fsdp` in compute dtype, then in the stored dtype.
    """
    return _gathered(w, tuple(axes), np.dtype(dtype), w.dtype)


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
