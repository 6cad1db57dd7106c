"""What the optimisers keep, in bytes a trained parameter, for a model of Llama 3.1 8B's shape.

    python benchmarks/optimisers.py        seconds, no weights: shapes only (jax.eval_shape)

Prints the tables of docs/training.md; a test holds them against what this gives.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.config.defaults import METHODS
from jaxtune.model import decoder
from jaxtune.spec import LayerSpec, ModelSpec, RopeSpec, Stack
from jaxtune.training.optim.optim import Hyper, optimiser
from jaxtune.training.state import init_opt_state
from jaxtune.training.trainable import trainable_subset
from jaxtune.tree import split

SPEC = ModelSpec(
    vocab=128256, width=4096,
    stacks=(Stack((LayerSpec(32, 8, 128, 14336, RopeSpec(500_000.0)),), 32),),
    norm_eps=1e-5, tie_head=False, max_positions=131072,
)  # fmt: skip
HYPERS = {
    "adamw": Hyper("adamw"),
    "schedule_free": Hyper("schedule_free"),
    "muon": Hyper("muon", momentum=0.95),
    "lion": Hyper("lion"),
    "sgd, momentum 0.9": Hyper("sgd", momentum=0.9),
    "adafactor": Hyper("adafactor"),
    "sgd": Hyper("sgd"),
}


def size(tree: Any) -> int:
    """Bytes of a tree of shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@functools.cache
def state_bytes(hyper: Hyper, last_layers: int | None = None) -> tuple[int, int, int]:
    """(state, trained parameters in f32, all parameters in f32), bytes."""
    chosen = trainable_subset(SPEC, trainable=None, train_last_layers=last_layers)
    spec, is_trained = (SPEC, lambda name: True) if chosen is None else (
        chosen.spec, chosen.is_trained,
    )  # fmt: skip
    params = decoder.abstract(spec, jnp.float32)
    axes, _ = split(decoder.axes(spec), is_trained)
    trained, _ = split(params, is_trained)
    made = optimiser(hyper, axes)
    state = jax.eval_shape(functools.partial(init_opt_state, made), trained)
    return size(state), size(trained), size(params)


def per_parameter() -> list[str]:
    rows = ["| `optim` | float32 | `optim_state_dtype: bfloat16` |", "|---|---|---|"]
    for name, hyper in HYPERS.items():
        state, trained, _ = state_bytes(hyper)
        few = "-"
        if METHODS[hyper.method].first_moment and (hyper.method != "sgd" or hyper.momentum):
            smaller, *_ = state_bytes(hyper._replace(state_dtype="bfloat16"))
            few = f"{4 * smaller / trained:.3g}"
        rows.append(f"| {name} | {4 * state / trained:.3g} | {few} |")
    return rows


def by_part() -> list[str]:
    rows = [
        "| `train_last_layers` | trained | parameters | gradients | adamw | together |",
        "|---|---|---|---|---|---|",
    ]
    for last in (None, 8, 2):
        state, trained, total = state_bytes(Hyper(), last)
        gb = [f"{part / 1e9:.1f} GB" for part in (total, trained, state, total + trained + state)]
        share = f"{100 * trained / total:.1f}%"
        rows.append(f"| {'not set' if last is None else last} | {share} | " + " | ".join(gb) + " |")
    return rows


if __name__ == "__main__":
    print("\n".join([*per_parameter(), "", *by_part()]))
