"""The state of training as one value: goes into the step, comes out of it, is what is saved."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.parallel.mesh import replicated
from jaxtune.training.optim.optim import Optimiser
from jaxtune.tree import named


class TrainState(NamedTuple):
    """`step` i32[]: updates attempted, which is also the position in the data; `trained`:
    the part of the variables that is trained, `{"params": ...}` or `{"lora": ...}`; `opt_state`:
    the optimiser's, moments placed like the leaves of `trained` they belong to.
    """

    step: jax.Array
    trained: Any
    opt_state: Any


def init_opt_state(optimiser: Optimiser, trained: Any) -> Any:
    """Fresh optimiser state, f32 even where parameters are stored in bfloat16."""
    return optimiser.init(jax.tree.map(lambda p: p.astype(jnp.float32), trained))


def abstract_state(trained: Any, optimiser: Optimiser) -> TrainState:
    """Shapes only: `trained` is a tree of ShapeDtypeStruct."""
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),  # type: ignore[arg-type]
        trained=trained,
        opt_state=jax.eval_shape(functools.partial(init_opt_state, optimiser), trained),
    )


HOST = "pinned_host"  # JAX's name of the host's memory that devices read and write


def state_shardings(
    abstract: TrainState, trained_shardings: Any, mesh: Mesh, *, offload: bool = False
) -> TrainState:
    """Moments live where their parameters live, or with `offload` in the memory of that device's
    host; counters everywhere.

    A leaf of the optimiser's state belongs to the parameter whose name ends its path. Where it has
    the parameter's size along a dimension it is cut like the parameter, elsewhere not at all.
    """
    sizes, where = named(abstract.trained), named(trained_shardings)
    everywhere = replicated(mesh)

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        if not name:
            return everywhere
        axes = [*where[name].spec, *[None] * leaf.ndim]
        same = [a == b for a, b in zip(leaf.shape, sizes[name].shape, strict=True)]
        axes = [axis if cut else None for axis, cut in zip(axes, same, strict=False)]
        return NamedSharding(mesh, PartitionSpec(*axes), memory_kind=HOST if offload else None)

    return TrainState(
        step=everywhere,  # type: ignore[arg-type]
        trained=trained_shardings,
        opt_state=jax.tree.map_with_path(place, abstract.opt_state),
    )
