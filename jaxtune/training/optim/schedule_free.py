"""Schedule-free AdamW (Defazio et al., arXiv:2405.15682): averaging in place of a falling schedule.

    y = beta1 x + (1 - beta1) z       the gradient is taken here
    z moves by AdamW without a first moment
    x <- x + share (z - x)            share = rate_max^2 / sum of all rate_max^2 so far

The parameters of the state are x, the average: it is what is evaluated, saved and exported, with
no step between. The authors' code keeps y instead and computes x when asked; the sequence is the
same, and keeping x costs the memory of one y while a step runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class ScheduleFreeState(NamedTuple):
    """`z` and `nu` (the second moment) f32, like the parameters; `rate_max` and `weight_sum`
    f32[]: the largest learning rate so far and the sum of its squares over steps.
    """

    updates: jax.Array
    rate_max: jax.Array
    weight_sum: jax.Array
    z: Any
    nu: Any


def init(params: Any) -> ScheduleFreeState:
    zero = jnp.zeros((), jnp.float32)
    return ScheduleFreeState(
        jnp.zeros((), jnp.int32),
        zero,
        zero,
        # A copy: the state and the parameters are both given away to the step.
        jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params),
        jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params),
    )


def point(params: Any, state: ScheduleFreeState, *, beta1: float) -> Any:
    """y, in the dtype of the parameters."""
    return jax.tree.map(
        lambda x, z: (beta1 * x.astype(jnp.float32) + (1.0 - beta1) * z).astype(x.dtype),
        params, state.z,
    )  # fmt: skip


def update(
    grads: Any,
    state: ScheduleFreeState,
    params: Any,
    rate: jax.Array,
    *,
    beta1: float,
    beta2: float,
    epsilon: float,
    decay: Callable[[Any], Any],
) -> tuple[Any, ScheduleFreeState]:
    """Return the update to add to x, and the next state.

    `decay(y)` is the decoupled weight decay at y, at learning rate 1.
    """
    count = state.updates + 1
    correction = 1.0 - beta2 ** count.astype(jnp.float32)
    nu = jax.tree.map(lambda v, g: beta2 * v + (1.0 - beta2) * jnp.square(g), state.nu, grads)
    pulls = decay(point(params, state, beta1=beta1))
    z = jax.tree.map(
        lambda z, g, v, pull: z - rate * (g / (jnp.sqrt(v / correction) + epsilon) + pull),
        state.z, grads, nu, pulls,
    )  # fmt: skip
    rate_max = jnp.maximum(state.rate_max, rate)
    weight = jnp.square(rate_max)
    weight_sum = state.weight_sum + weight
    share = jnp.where(weight_sum > 0, weight / jnp.where(weight_sum > 0, weight_sum, 1.0), 0.0)
    deltas = jax.tree.map(lambda x, new: share * (new - x.astype(jnp.float32)), params, z)
    return deltas, ScheduleFreeState(count, rate_max, weight_sum, z, nu)
