"""Muon (Keller Jordan, kellerjordan.github.io/posts/muon): momentum, orthogonalised by matrix.

For the matrices of the layers alone. Embeddings, the head, norms and biases take AdamW, as the
author's code and torch.optim.Muon ask for; `optim` puts the two together.

optax.contrib.muon is not used: its bias-corrected Nesterov momentum is another direction than
Jordan's and torch's in the first steps, and it orthogonalises all layers of a stack at once,
which needs the memory of all their Gram matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.training.optim.matrices import Dims, size
from jaxtune.tree import named, unnamed

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPSILON = 1e-7

# How long a step is for a matrix of so many rows and columns. `original` keeps the spectral norm;
# `match_rms_adamw` makes the root mean square of a step that of AdamW's typical one, so that one
# learning rate and decay serve both (Liu et al., arXiv:2502.16982, section 2.2).
ADJUST: Mapping[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, columns / rows)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


class MuonState(NamedTuple):
    """`mu`: running mean of the gradient, a tree of the matrices alone."""

    mu: Any


def init(params: Mapping[str, jax.Array], dtype: Any) -> MuonState:
    return MuonState(unnamed({name: jnp.zeros(p.shape, dtype) for name, p in params.items()}))


def update(
    grads: Mapping[str, jax.Array],
    state: MuonState,
    where: Mapping[str, Dims],
    *,
    momentum: float,
    adjust: str,
) -> tuple[dict[str, jax.Array], MuonState]:
    """Steps to be subtracted at learning rate 1, f32, in the shapes of `grads`."""
    before, after, steps = named(state.mu), {}, {}
    for name, grad in grads.items():
        mu = momentum * before[name].astype(jnp.float32) + (1.0 - momentum) * grad
        nesterov = momentum * mu + (1.0 - momentum) * grad
        rows, columns = (size(grad.shape, side) for side in where[name][1:])
        steps[name] = ADJUST[adjust](rows, columns) * orthogonalised(nesterov, where[name])
        after[name] = mu.astype(before[name].dtype)
    return steps, MuonState(unnamed(after))


def orthogonalised(x: jax.Array, where: Dims) -> jax.Array:
    """Each matrix of `x` with its singular values brought near 1, in the shape of `x`.

    Newton-Schulz, five times, as Jordan's: they end between about 0.7 and 1.2, not at 1. One
    layer at a time, so that what it holds beside `x` is a few matrices of one layer.
    """
    rows, columns = size(x.shape, where.rows), size(x.shape, where.columns)
    order = where.stack + where.rows + where.columns
    assert order == tuple(range(x.ndim)), "a matrix's dimensions lie in order, its stack first"
    layers = x.shape[: len(where.stack[:1])]
    experts = x.shape[len(layers) : len(where.stack)]
    flat = x.reshape(*layers, *experts, rows, columns)
    orthogonal = jax.lax.map(_newton_schulz, flat) if layers else _newton_schulz(flat)
    return orthogonal.reshape(x.shape)


def _newton_schulz(x: jax.Array) -> jax.Array:
    """`[... rows columns]` f32, through the smaller of its two Gram matrices."""
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=(-2, -1), keepdims=True), EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x
