"""Gradients -> what to add to the parameters: six methods behind one pair of pure functions.

An `Optimiser` has no learning rate of its own: the step hands it in, as a pure function of its
number, so a resumed run cannot be off by one. State is f32 whatever the parameters are, except
first moments with `state_dtype=bfloat16`.

Weight decay is decoupled (added at learning rate 1 to the step; with sgd to the gradient, before
the momentum, as torch does) and skips norms and biases, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtune.training.optim import adafactor, muon, schedule_free
from jaxtune.training.optim.matrices import Dims, dims, is_hidden, is_matrix
from jaxtune.tree import map_named, named, unnamed


class Hyper(NamedTuple):
    """Hyper-parameters under their Hugging Face names; defaults are Hugging Face's for adamw.

    `momentum` is of sgd and muon, `adjust` of muon (`muon.ADJUST`), `state_dtype` of first moments.
    """

    method: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    adjust: str = "match_rms_adamw"
    state_dtype: str = "float32"


class Optimiser(NamedTuple):
    """`init(params) -> state`, params f32; `update(grads, state, params, rate) -> (deltas, state)`,
    deltas f32, to be added; `point(params, state) -> params`: where the gradient is to be taken.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any, jax.Array], tuple[Any, Any]]
    point: Callable[[Any, Any], Any] = lambda params, state: params


def optimiser(hyper: Hyper, axes: Any) -> Optimiser:
    """`axes`: the logical axes of the parameters to be trained, in their tree."""
    if hyper.method not in METHODS:
        raise ValueError(f"optim '{hyper.method}'; there are: {', '.join(METHODS)}")
    return METHODS[hyper.method](hyper, axes)


def is_decayed(name: str) -> bool:
    """By name, not by rank: stacked norms are `[L D]`. Embeddings decay, as in transformers.

    Total on purpose: a parameter that no rule covers is an error, not a silent default.
    """
    return is_matrix(name)


def _decay(hyper: Hyper) -> optax.GradientTransformation:
    return optax.add_decayed_weights(
        hyper.weight_decay, mask=lambda params: map_named(lambda name, _: is_decayed(name), params)
    )


def _descend(direction: optax.GradientTransformation) -> Optimiser:
    """An optax transformation that ends in a direction, stepped along by the learning rate."""

    def update(grads: Any, state: Any, params: Any, rate: jax.Array) -> tuple[Any, Any]:
        steps, state = direction.update(grads, state, params)
        return jax.tree.map(lambda step: -rate * step.astype(jnp.float32), steps), state

    return Optimiser(direction.init, update)


def _adam(hyper: Hyper) -> optax.GradientTransformation:
    """The second moment stays f32: in bfloat16 a change by 1 - beta2 would be rounded away."""
    return optax.scale_by_adam(
        b1=hyper.beta1, b2=hyper.beta2, eps=hyper.epsilon, mu_dtype=hyper.state_dtype
    )


def adamw(hyper: Hyper, axes: Any) -> Optimiser:
    """Loshchilov & Hutter, arXiv:1711.05101; equals torch.optim.AdamW."""
    return _descend(optax.chain(_adam(hyper), _decay(hyper)))


def lion(hyper: Hyper, axes: Any) -> Optimiser:
    """Chen et al., arXiv:2302.06675: the sign of an interpolated momentum."""
    sign = optax.scale_by_lion(b1=hyper.beta1, b2=hyper.beta2, mu_dtype=hyper.state_dtype)
    return _descend(optax.chain(sign, _decay(hyper)))


def sgd(hyper: Hyper, axes: Any) -> Optimiser:
    """torch.optim.SGD's meaning of momentum and of weight decay, which goes through it."""
    if hyper.momentum == 0:
        return _descend(_decay(hyper))
    trace = optax.trace(decay=hyper.momentum, accumulator_dtype=jnp.dtype(hyper.state_dtype))
    return _descend(optax.chain(_decay(hyper), trace))


def factored(hyper: Hyper, axes: Any) -> Optimiser:
    """Adafactor over the true matrices of stacked leaves."""
    where = _places(axes)

    def init(params: Any) -> adafactor.AdafactorState:
        return adafactor.init(named(params), where)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        steps, state = adafactor.update(named(grads), state, where)
        return unnamed(steps), state

    return _descend(_then_decay(init, update, hyper))


def orthogonal(hyper: Hyper, axes: Any) -> Optimiser:
    """Muon for the matrices of the layers, AdamW for all else."""
    logical = named(axes)
    hidden = {n: place for n, place in _places(axes).items() if is_hidden(n, logical[n])}
    adam = _adam(hyper)

    def split(tree: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        leaves = named(tree)
        return (
            {name: leaf for name, leaf in leaves.items() if name in hidden},
            {name: leaf for name, leaf in leaves.items() if name not in hidden},
        )

    def init(params: Any) -> Any:
        matrices, others = split(params)
        return muon.init(matrices, hyper.state_dtype), adam.init(others)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        matrices, others = split(grads)
        steps, first = muon.update(
            matrices, state[0], hidden, momentum=hyper.momentum, adjust=hyper.adjust
        )
        other_steps, second = adam.update(others, state[1])
        return unnamed({**steps, **other_steps}), (first, second)

    return _descend(_then_decay(init, update, hyper))


def averaged(hyper: Hyper, axes: Any) -> Optimiser:
    """Schedule-free AdamW."""

    def decay(params: Any) -> Any:
        pull = hyper.weight_decay
        return map_named(
            lambda name, p: pull * p.astype(jnp.float32) if is_decayed(name) else 0.0 * p, params
        )

    def update(grads: Any, state: Any, params: Any, rate: jax.Array) -> tuple[Any, Any]:
        return schedule_free.update(
            grads, state, params, rate,
            beta1=hyper.beta1, beta2=hyper.beta2, epsilon=hyper.epsilon, decay=decay,
        )  # fmt: skip

    def point(params: Any, state: Any) -> Any:
        return schedule_free.point(params, state, beta1=hyper.beta1)

    return Optimiser(schedule_free.init, update, point)


METHODS: Mapping[str, Callable[[Hyper, Any], Optimiser]] = {
    "adamw": adamw,
    "adafactor": factored,
    "lion": lion,
    "sgd": sgd,
    "muon": orthogonal,
    "schedule_free": averaged,
}


def _then_decay(init: Any, update: Any, hyper: Hyper) -> optax.GradientTransformation:
    return optax.chain(optax.GradientTransformation(init, update), _decay(hyper))


def _places(axes: Any) -> dict[str, Dims]:
    return {name: dims(name, logical) for name, logical in named(axes).items()}


def squares(tree: Any) -> list[jax.Array]:
    """The sum of squares of each leaf, in f32, in the order of `tree.named`."""
    return [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]


def norm_of(squares: list[jax.Array]) -> jax.Array:
    """The 2-norm over all leaves, from their `squares`."""
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))


def clip(tree: Any, norm: jax.Array, max_norm: float) -> Any:
    """Scale to `max_norm` when `norm` is larger, as torch's clip_grad_norm_; 0 = off."""
    if max_norm == 0:
        return tree
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda leaf: leaf * scale, tree)
