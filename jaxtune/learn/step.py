"""One optimiser step as a pure function, and its evaluation twin.

microbatch m  ->  gradient of loss + penalty, and Sums      lax.scan over M, f32 accumulators
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

from jaxtune.learn import optim
from jaxtune.learn.objectives import Objective, Tokens, add, zero_sums
from jaxtune.learn.schedules import Schedule
from jaxtune.learn.state import TrainState
from jaxtune.mesh import constrain
from jaxtune.ops.cross_entropy import Sums
from jaxtune.tree import merge


class StepMetrics(NamedTuple):
    """Scalars of one step, f32: `loss` = sum(w*ce)/sum(w); `finite` is 1.0 unless loss or gradient
    norm is not finite; `weight` is sum(w). `penalty` is what else was minimised: the routers'.
    """

    loss: jax.Array
    token_accuracy: jax.Array
    weight: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    finite: jax.Array
    penalty: jax.Array


def split_microbatches(batch: Tokens, count: int) -> Any:
    """[B T] -> [M B/M T] with row b in microbatch b % M: every device keeps its own rows."""

    def split(x: jax.Array) -> jax.Array:
        rows, length = x.shape
        x = constrain(x.reshape(rows // count, count, length), "batch", None, "length")
        return constrain(x.swapaxes(0, 1), None, "batch", "length")

    return jax.tree.map(split, batch)


def train_step(
    state: TrainState,
    frozen: Any,
    batch: Tokens,
    *,
    objective: Objective,
    optimiser: optim.Optimiser,
    learning_rate: Schedule,
    max_grad_norm: float,
    microbatches: int,
    trained_axes: Any,
    seed: int,
) -> tuple[TrainState, StepMetrics]:
    """`batch` arrays are [B T], B divisible by `microbatches`. Pure; jitted by `program`."""

    key_of_step = jax.random.fold_in(jax.random.key(seed), state.step)

    def loss(trained: Any, rows: Tokens, number: Any) -> tuple[jax.Array, Sums]:
        key = jax.random.fold_in(key_of_step, number)
        sums = objective(merge(trained, frozen), rows, key)
        return sums.loss + sums.penalty, sums

    gradient = jax.grad(loss, has_aux=True)
    point = optimiser.point(state.trained, state.opt_state)

    def as_stored(grads: Any) -> Any:
        """f32, placed as the parameters are: what makes the compiler scatter, not replicate."""
        return jax.tree.map(
            lambda axes, g: constrain(g.astype(jnp.float32), *axes),
            trained_axes, grads, is_leaf=lambda x: isinstance(x, tuple),
        )  # fmt: skip

    if microbatches == 1:
        grads, sums = gradient(point, batch, 0)
        grads = as_stored(grads)
    else:

        def accumulate(total: Any, part: Any) -> tuple[Any, None]:
            new_grads, new_sums = gradient(point, *part)
            grads = as_stored(jax.tree.map(jnp.add, total[0], as_stored(new_grads)))
            return (grads, add(total[1], new_sums)), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.trained)
        (grads, sums), _ = jax.lax.scan(
            accumulate,
            (as_stored(zeros), zero_sums()),
            (split_microbatches(batch, microbatches), jnp.arange(microbatches)),
        )

    per_weight = jnp.where(sums.weight > 0, 1.0 / jnp.where(sums.weight > 0, sums.weight, 1.0), 0.0)
    grads = jax.tree.map(lambda g: g * per_weight, grads)
    norm = optim.global_norm(grads)
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
        penalty=sums.penalty * per_weight,
    )


def eval_step(trained: Any, frozen: Any, batch: Tokens, *, objective: Objective) -> Sums:
    """Sums over one batch; the caller adds batches up and divides once. Nothing is random."""
    return objective(merge(trained, frozen), batch, None)


Train = Callable[[TrainState, Any, Tokens], tuple[TrainState, StepMetrics]]
Evaluate = Callable[[Any, Any, Tokens], Sums]
