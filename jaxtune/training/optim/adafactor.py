"""Adafactor (Shazeer & Stern, arXiv:1804.04235): the second moment of a matrix by rows and columns.

What transformers' trainer means by `optim: adafactor`: a given learning rate, no first moment, no
scaling by the parameter, updates clipped to root mean square 1. optax.adafactor is not used: it
factors the two largest dimensions of a leaf, which in a stack of layers are not its matrix, and
clips by the mean over all layers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.training.optim.matrices import Dims
from jaxtune.tree import named, unnamed

EPSILON = 1e-30
DECAY = 0.8
THRESHOLD = 1.0


class AdafactorState(NamedTuple):
    """`updates` i32[]: updates so far. `rows` and `columns`: second moments, with size 1 where they
    are means over the other side; a vector is whole in `rows` and not in `columns`.
    """

    updates: jax.Array
    rows: Any
    columns: Any


def init(params: Mapping[str, jax.Array], where: Mapping[str, Dims]) -> AdafactorState:
    def zeros(name: str, mean_over: tuple[int, ...]) -> jax.Array:
        shape = params[name].shape
        return jnp.zeros([1 if i in mean_over else n for i, n in enumerate(shape)], jnp.float32)

    return AdafactorState(
        jnp.zeros((), jnp.int32),
        unnamed({name: zeros(name, place.columns) for name, place in where.items()}),
        unnamed({n: zeros(n, place.rows) for n, place in where.items() if place.columns}),
    )


def update(
    grads: Mapping[str, jax.Array], state: AdafactorState, where: Mapping[str, Dims]
) -> tuple[dict[str, jax.Array], AdafactorState]:
    """Steps to be subtracted at learning rate 1, f32, in the shapes of `grads`."""
    count = state.updates + 1
    decay = 1.0 - count.astype(jnp.float32) ** -DECAY
    row_moments, column_moments = named(state.rows), named(state.columns)
    steps: dict[str, jax.Array] = {}
    for name, grad in grads.items():
        place = where[name]
        square = jnp.square(grad) + EPSILON
        rows = decay * row_moments[name] + (1.0 - decay) * _mean(square, place.columns)
        scale = jax.lax.rsqrt(rows)
        if place.columns:
            columns = decay * column_moments[name] + (1.0 - decay) * _mean(square, place.rows)
            scale = scale * jax.lax.rsqrt(columns / _mean(rows, place.rows))
            column_moments[name] = columns
        step = grad * scale
        rms = jnp.sqrt(_mean(jnp.square(step), place.rows + place.columns))
        steps[name] = step / jnp.maximum(rms / THRESHOLD, 1.0)
        row_moments[name] = rows
    return steps, AdafactorState(count, unnamed(row_moments), unnamed(column_moments))


def _mean(x: jax.Array, over: tuple[int, ...]) -> jax.Array:
    return jnp.mean(x, axis=over, keepdims=True) if over else x
