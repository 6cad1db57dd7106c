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
    """`step` i32[]: updates attempted, which is also the position in the data; `params`: the
    trained collection; `opt_state`: the optimiser's, moments like `params` and placed like them.
    """

    step: jax.Array
    params: Any
    opt_state: Any


def init_opt_state(tx: optax.GradientTransformation, params: Any) -> Any:
    """Fresh optimiser state, f32 even where parameters are stored in bfloat16."""
    return tx.init(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))


def abstract_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """Shapes only: `params` is a tree of ShapeDtypeStruct."""
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),  # type: ignore[arg-type]
        params=params,
        opt_state=jax.eval_shape(functools.partial(init_opt_state, tx), params),
    )


def state_shardings(
    abstract: TrainState, param_shardings: Any, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Moments live where their parameters live; counters everywhere."""
    everywhere = replicated(mesh)
    return TrainState(
        step=everywhere,  # type: ignore[arg-type]
        params=param_shardings,
        opt_state=optax.tree_map_params(
            tx,
            lambda _, sharding: sharding,
            abstract.opt_state,
            param_shardings,
            transform_non_params=lambda _: everywhere,
        ),
    )
