"""The state of training as one value: goes into the step, comes out of it, is what is saved."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxtune.mesh import replicated


class TrainState(NamedTuple):
    """`step` i32[]: updates attempted, which is also the position in the data; `trained`:
    the part of the variables that is trained, `{"params": ...}` or `{"lora": ...}`; `opt_state`:
    the optimiser's, moments like `trained` and placed like them.
    """

    step: jax.Array
    trained: Any
    opt_state: Any


def init_opt_state(tx: optax.GradientTransformation, trained: Any) -> Any:
    """Fresh optimiser state, f32 even where parameters are stored in bfloat16."""
    return tx.init(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained))


def abstract_state(trained: Any, tx: optax.GradientTransformation) -> TrainState:
    """Shapes only: `trained` is a tree of ShapeDtypeStruct."""
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),  # type: ignore[arg-type]
        trained=trained,
        opt_state=jax.eval_shape(functools.partial(init_opt_state, tx), trained),
    )


def state_shardings(
    abstract: TrainState, trained_shardings: Any, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Moments live where their parameters live; counters everywhere."""
    everywhere = replicated(mesh)
    return TrainState(
        step=everywhere,  # type: ignore[arg-type]
        trained=trained_shardings,
        opt_state=optax.tree_map_params(
            tx,
            lambda _, sharding: sharding,
            abstract.opt_state,
            trained_shardings,
            transform_non_params=lambda _: everywhere,
        ),
    )
