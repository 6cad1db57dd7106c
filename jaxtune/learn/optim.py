"""Gradients -> updates: AdamW by name-based rules, and schedules with Hugging Face's meaning.

The learning rate is no state: it is a pure function of the step, applied by `step.train_step`, so
a resumed run cannot be off by one. Moments are f32 whatever the parameters are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtune.tree import map_named

Schedule = Callable[[jax.Array], jax.Array]

# Parameters that weight decay pulls towards zero. By name, not by rank: where layers are stacked
# a norm's scale is [L D] and would pass for a matrix. Embeddings decay, as in transformers.
DECAYED = re.compile(r"(kernel|table|rows|/a|/b)$")
NOT_DECAYED = re.compile(r"(scale|bias|sinks|magnitude)$")


class AdamW(NamedTuple):
    """Hyper-parameters under their Hugging Face names; defaults are Hugging Face's."""

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0


def is_decayed(name: str) -> bool:
    """Total on purpose: a parameter that no rule covers is an error, not a silent default."""
    if DECAYED.search(name):
        return True
    if NOT_DECAYED.search(name):
        return False
    raise ValueError(f"no weight decay rule covers parameter '{name}'")


def transform(hyper: AdamW) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) for learning rate 1; f32 moments.

    The update equals torch.optim.AdamW's: `-(m_hat / (sqrt(v_hat) + epsilon) + decay * p)`, to be
    scaled by the learning rate.
    """
    return optax.chain(
        optax.scale_by_adam(b1=hyper.beta1, b2=hyper.beta2, eps=hyper.epsilon),
        optax.add_decayed_weights(
            hyper.weight_decay,
            mask=lambda params: map_named(lambda name, _: is_decayed(name), params),
        ),
        optax.scale(-1.0),
    )


def warmup_length(warmup_steps: float, total_steps: int) -> int:
    """Hugging Face 5's meaning: below 1 a share of all steps (rounded up), else a number."""
    return math.ceil(total_steps * warmup_steps) if warmup_steps < 1 else round(warmup_steps)


def schedule(kind: str, *, learning_rate: float, warmup_steps: int, total_steps: int) -> Schedule:
    """step (0 for the first update) -> learning rate, f32.

    As in transformers: `learning_rate * step / warmup_steps` while warming up, so the first step
    of a warmup has learning rate 0; then `linear` to 0 at `total_steps`, `cosine` (half a wave) to
    0, or `constant`, which has no warmup (`constant_with_warmup` has).
    """
    if kind not in SHAPES:
        raise ValueError(f"lr_scheduler_type '{kind}'; there are: {', '.join(SHAPES)}")
    shape = SHAPES[kind]
    warmup = 0 if kind == "constant" else warmup_steps

    def at(step: jax.Array) -> jax.Array:
        now = jnp.asarray(step, jnp.float32)
        rising = now / max(warmup, 1)
        progress = (now - warmup) / max(total_steps - warmup, 1)
        return learning_rate * jnp.where(now < warmup, rising, shape(jnp.clip(progress, 0.0, 1.0)))

    return at


SHAPES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
    "constant": jnp.ones_like,
    "constant_with_warmup": jnp.ones_like,
}


def global_norm(tree: Any) -> jax.Array:
    """The 2-norm over all leaves, squared and summed in f32."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))


def clip(tree: Any, norm: jax.Array, max_norm: float) -> Any:
    """Scales to `max_norm` when `norm` is larger, as torch's clip_grad_norm_; 0 = off."""
    if max_norm == 0:
        return tree
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda leaf: leaf * scale, tree)
