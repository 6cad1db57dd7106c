"""An optimiser step as a pure function, and its evaluation twin.

microbatch m  ->  gradient of loss + auxiliary, and Sums      lax.scan over M, f32 accumulators
all           ->  gradients / sum(w)                        ONE division, by the global weight
              ->  clip -> the optimiser, with learning_rate(step)
guard         ->  a step with no weight, or with anything non-finite, changes no parameter

The variables are two trees: `trained`, which the step owns and for which gradients exist, and
`frozen`, which it only reads. Randomness is a key of (seed, step, microbatch) and nothing else, so
a resumed run draws what an unbroken one would have drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.model.layers import GRADIENT_SINK
from jaxtune.ops.cross_entropy import Sums, TokenLosses
from jaxtune.parallel import collectives
from jaxtune.training.objectives import Objective, Tokens, add, zero_sums
from jaxtune.training.optim import optim
from jaxtune.training.schedules import Schedule
from jaxtune.training.state import TrainState
from jaxtune.tree import merge


class StepMetrics(NamedTuple):
    """Scalars of one step, f32: `loss` is what was minimised, `nll` = sum(w*ce)/sum(w), the same
    unless with another loss_type; `finite` is 1.0 unless loss or gradient norm is not finite;
    `weight` is sum(w). `auxiliary` is what else was minimised: the routers'.
    `leaf_norms` are the gradient norms of the trained leaves `[leaves]`, in the order of
    `tree.named`: they say where a gradient went wrong.
    """

    loss: jax.Array
    token_accuracy: jax.Array
    weight: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    finite: jax.Array
    auxiliary: jax.Array
    nll: jax.Array
    leaf_norms: jax.Array


def split_microbatches(batch: Tokens, count: int) -> Any:
    """[B T] -> [M B/M T] with row b in microbatch b % M, so that every device keeps its rows."""

    def split(x: jax.Array) -> jax.Array:
        rows, length = x.shape
        return x.reshape(rows // count, count, length).swapaxes(0, 1)

    return jax.tree.map(split, batch)


class GradientConfig(NamedTuple):
    """An objective, the microbatches of a step, and the seed; `dtype` is of the computation."""

    objective: Objective
    microbatches: int
    seed: int
    dtype: Any


def gradient(
    trained: Any,
    frozen: Any,
    batch: Tokens,
    step: jax.Array,
    *,
    config: GradientConfig,
    axes: Any,
    shapes: Any,
) -> tuple[Any, Sums]:
    """Gradients of loss + auxiliary, f32 and summed, and the sums.

    Runs under `collectives.shard_map_step`. `axes` and `shapes` are of the whole `trained`, of
    which a device has its slices.
    """
    microbatches = config.microbatches
    key_of_step = jax.random.fold_in(jax.random.key(config.seed), step)
    weights = trained.get("params", {})
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, config.dtype), weights)

    def loss(trained: Any, sink: Any, rows: Tokens, number: Any) -> tuple[jax.Array, Sums]:
        key = jax.random.fold_in(key_of_step, number)
        variables = {**merge(trained, frozen), GRADIENT_SINK: sink}
        sums = config.objective(variables, rows, key)
        return sums.loss + sums.auxiliary, sums

    def of_rows(rows: Tokens, number: Any) -> tuple[Any, Sums]:
        of_both = jax.grad(loss, argnums=(0, 1), has_aux=True)
        (grads, arrived), sums = of_both(trained, zeros, rows, number)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        if weights:  # a gradient is in one of the two trees; the other has zeros there
            grads["params"] = jax.tree.map(jnp.add, grads["params"], arrived)
        return grads, sums

    if microbatches == 1:
        grads, sums = of_rows(batch, 0)
    else:

        def accumulate(so_far: Any, part: Any) -> tuple[Any, None]:
            grads, sums = of_rows(*part)
            return (jax.tree.map(jnp.add, so_far[0], grads), add(so_far[1], sums)), None

        none = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained)
        parts = split_microbatches(batch, microbatches), jnp.arange(microbatches)
        (grads, sums), _ = jax.lax.scan(accumulate, (none, zero_sums()), parts)
    return collectives.summed(grads, axes, shapes), collectives.total(sums)


def train_step(
    state: TrainState,
    frozen: Any,
    batch: Tokens,
    *,
    gradient: Callable[[Any, Any, Tokens, jax.Array], tuple[Any, Sums]],
    optimiser: optim.Optimiser,
    learning_rate: Schedule,
    max_grad_norm: float,
) -> tuple[TrainState, StepMetrics]:
    """`batch` arrays are [B T], B divisible by `microbatches`. Pure; jitted by `program`."""
    point = optimiser.point(state.trained, state.opt_state)
    grads, sums = gradient(point, frozen, batch, state.step)
    per_weight = jnp.where(sums.weight > 0, 1.0 / jnp.where(sums.weight > 0, sums.weight, 1.0), 0.0)
    grads = jax.tree.map(lambda g: g * per_weight, grads)
    squares = optim.squares(grads)
    norm = optim.norm_of(squares)
    finite = jnp.isfinite(sums.loss) & jnp.isfinite(norm)
    changes = finite & (sums.weight > 0)

    rate = learning_rate(state.step)
    deltas, opt_state = optimiser.update(
        optim.clip(grads, norm, max_grad_norm), state.opt_state, state.trained, rate
    )

    def move(p: jax.Array, delta: jax.Array) -> jax.Array:
        # `p + 0.0` would turn a stored -0.0 into 0.0: at learning rate 0 every byte stays.
        moved = (p.astype(jnp.float32) + delta).astype(p.dtype)
        return jnp.where(changes & (delta != 0), moved, p)

    new = TrainState(
        step=state.step + 1,
        trained=jax.tree.map(move, state.trained, deltas),
        opt_state=jax.tree.map(
            lambda after, before: jnp.where(changes, after, before), opt_state, state.opt_state
        ),
    )
    return new, StepMetrics(
        loss=sums.loss * per_weight,
        token_accuracy=sums.correct * per_weight,
        weight=sums.weight,
        grad_norm=norm,
        learning_rate=rate,
        finite=finite.astype(jnp.float32),
        auxiliary=sums.auxiliary * per_weight,
        nll=sums.nll * per_weight,
        leaf_norms=jnp.sqrt(jnp.stack(squares)),
    )


def eval_step(trained: Any, frozen: Any, batch: Tokens, *, objective: Objective) -> Sums:
    """Sums over one batch; the caller adds batches up and divides once. Nothing is random.

    Runs under `collectives.shard_map_step`.
    """
    return collectives.total(objective(merge(trained, frozen), batch, None))


Train = Callable[[TrainState, Any, Tokens], tuple[TrainState, StepMetrics]]
Evaluate = Callable[[Any, Any, Tokens], Sums]
EachToken = Callable[[Any, Tokens], TokenLosses]
