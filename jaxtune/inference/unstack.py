"""A model with every layer in a stack of its own: the same numbers in other leaves.

XLA for CPU copies a layer's weights out of their stack before it multiplies with them. A step of
one token does little but read weights, so that copy makes it three times as long: on a CPU models
decode layer by layer. It costs compile time for every layer; TPUs and GPUs read a stack in place.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax

from jaxtune.spec import ModelSpec, Stack
from jaxtune.tree import named, unnamed

Variables = Mapping[str, Any]  # collection -> stack_{i} -> ..., leaves [L ...]


def unstack(
    spec: ModelSpec, variables: Variables, *, platform: str, consume: bool = False
) -> tuple[ModelSpec, Variables]:
    """Unstack the layers of a model that decodes on a CPU; any other comes back as it is.

    `consume` deletes each stacked leaf as soon as its layers exist.
    """
    if platform != "cpu" or all(stack.repeats == 1 for stack in spec.stacks):
        return spec, variables
    unstacked: dict[str, dict[str, Any]] = {}
    for name, collection in variables.items():
        unstacked[name] = {key: tree for key, tree in collection.items() if key[:6] != "stack_"}
        first = 0
        for i, stack in enumerate(spec.stacks):
            if f"stack_{i}" in collection:
                layers = _layers(collection[f"stack_{i}"], stack.repeats, consume)
                unstacked[name] |= {f"stack_{first + r}": layer for r, layer in enumerate(layers)}
            first += stack.repeats
    stacks = [Stack(stack.pattern, 1) for stack in spec.stacks for _ in range(stack.repeats)]
    return replace(spec, stacks=tuple(stacks)), unstacked


def _layers(tree: Any, repeats: int, consume: bool) -> list[Any]:
    if repeats == 1:
        return [tree]
    parts = {}
    for name, leaf in named(tree).items():
        parts[name] = _split(leaf, repeats)
        if consume:
            for part in parts[name]:
                part.block_until_ready()
            leaf.delete()
    return [unnamed({name: part[r] for name, part in parts.items()}) for r in range(repeats)]


@functools.partial(jax.jit, static_argnums=1)
def _split(leaf: jax.Array, repeats: int) -> tuple[jax.Array, ...]:
    return tuple(leaf[r : r + 1] for r in range(repeats))
