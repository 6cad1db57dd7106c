"""Training a part of the parameters: which leaves, and a spec in which they stand alone.

What is not trained is frozen for real: it is outside the optimiser, the checkpoint and the
differentiation, and a backward pass ends at the first layer that is trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.config import ConfigError
from jaxtune.model import decoder
from jaxtune.spec import Backward, ModelSpec, apart
from jaxtune.tree import named, select


class TrainableSubset(NamedTuple):
    """A choice of parameters: `spec` is the model to build for it, `names` are like `head/kernel`.

    `fields` are the config fields that chose them, as a checkpoint records them.
    """

    spec: ModelSpec
    names: frozenset[str]
    fields: Mapping[str, Any]

    def is_trained(self, variable: str) -> bool:
        """By the name of a variable, `params/head/kernel`."""
        return variable.removeprefix("params/") in self.names


def trainable_subset(
    spec: ModelSpec, *, trainable: str | None, train_last_layers: int | None
) -> TrainableSubset | None:
    """Choose parameters by the two config fields together; None when neither is set.

    The layers of a stack are one leaf, so its last ones become a stack of their own; `trainable`,
    a regex, is searched in the names that result. Raises `ConfigError` when a pattern matches
    nothing or there are not so many layers.
    """
    if trainable is None and train_last_layers is None:
        return None
    first = len(spec.stacks)
    if train_last_layers is not None:
        try:
            spec, first = apart(spec, train_last_layers)
        except ValueError as error:
            raise ConfigError(f"train_last_layers: {error}.") from None
    params = decoder.abstract(spec, jnp.float32)
    last = tuple(f"stack_{i}/" for i in range(first, len(spec.stacks)))
    names = {name for name in named(params) if name.startswith(last)}
    if trainable is not None:
        try:
            chosen = named(select(params, trainable))
        except ConfigError as error:
            raise ConfigError(f"trainable: {error}") from None
        names |= {name for name, matches in chosen.items() if matches}
    fields = {"trainable": trainable, "train_last_layers": train_last_layers}
    return TrainableSubset(spec, frozenset(names), fields)


def backward(spec: ModelSpec, trained: Any) -> Backward:
    """Describe what the backward pass of a step computes.

    `trained` are the shapes of the trained variables: parameters, adapters, or both.
    """
    params, leaves = named(trained.get("params", {})), named(trained)
    depth = len(spec.stacks)
    table = any(name.split("/")[1] == "embed" for name in leaves)
    stacks = (i for i in range(depth) if any(f"/stack_{i}/" in name for name in leaves))
    first = 0 if table else min(stacks, default=depth)
    norm = any("/final_norm/" in name for name in leaves)

    def trained_in(i: int, j: int, *, experts: bool) -> int:
        here = f"stack_{i}/layer_{j}/"
        banks = tuple(f"{here}moe/{name}/kernel" for name in ("gate", "up", "down"))
        sizes = (
            math.prod(leaf.shape[1:])
            for name, leaf in params.items()
            if name.startswith(here) and name.endswith("/kernel") and (name in banks) is experts
        )
        return sum(sizes)

    def each(*, experts: bool) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(trained_in(i, j, experts=experts) for j in range(len(stack.pattern)))
            for i, stack in enumerate(spec.stacks)
        )

    head = ("embed/table" if spec.tie_head else "head/kernel") in params
    numbers = sum(math.prod(leaf.shape) for leaf in leaves.values())
    weights = each(experts=False), each(experts=True)
    return Backward(first, first < depth or norm, *weights, head, numbers)


def share(trained: Any, variables: Any) -> str:
    """`1,234 of 56,789 parameters (2.17%)`, of trees of shapes or arrays."""

    def count(tree: Any) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    n, total = count(trained), count(variables)
    return f"{n:,} of {total:,} parameters ({100 * n / total:.3g}%)"
