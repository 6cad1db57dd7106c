"""Adapters merged into their base: computed from the model folder's own tensors, in float32, one
tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxtune.hf.adapter_write import on_host
from jaxtune.hf.layout import Placed
from jaxtune.hf.load import HfModel, load_params, read_part
from jaxtune.hf.peft_names import adapted
from jaxtune.model.lora import Lora, merged_kernel
from jaxtune.tree import map_named, named, unnamed


def merged(model: HfModel, lora: Lora, adapters: Any) -> Any:
    """A tree for `export_model`: each leaf a function that gives a part of the merged parameter.

    The base is read anew from the model folder, in float32, whatever was trained on: merging into
    quantised or rounded weights would keep their error.
    """
    leaves = on_host(adapters)
    projections = set(adapted(leaves))

    def part_of(name: str, placed: Placed) -> Callable[[Mapping[int, int]], np.ndarray]:
        def part(at: Mapping[int, int]) -> np.ndarray:
            index = tuple(
                slice(at[axis], at[axis] + 1) if axis in at else slice(0, size)
                for axis, size in enumerate(placed.shape)
            )
            values = read_part(model, name, index).squeeze(tuple(at))
            module, _, leaf = name.rpartition("/")
            if leaf == "kernel" and module in projections:
                own = {
                    key: leaves[f"{module}/{key}"][at[0]]
                    for key in ("a", "b", "magnitude")
                    if f"{module}/{key}" in leaves
                }
                letters = "".join(placed.row.axes[1:])
                shared = "".join(x for x in letters if x in placed.row.groups[1])
                return merged_kernel(own, values, letters, shared, lora)
            if f"{module}/rows" in leaves and leaf in ("table", "kernel"):
                by_token = np.moveaxis(values, placed.row.axes.index("V"), 0)
                by_token[list(lora.tokens)] = leaves[f"{module}/rows"]
            return values

        return part

    return unnamed({name: part_of(name, placed) for name, placed in model.placed.items()})


def merged_params(model: HfModel, lora: Lora, adapters: Any, placed: Any, dtype: Any) -> Any:
    """The merged parameters in `dtype`, each leaf in its sharding of the tree `placed`; one
    adapted parameter at a time stands whole on the host."""
    names = {f"{name}/kernel" for name in adapted(on_host(adapters))}
    names |= {"embed/table", "head/kernel"} if lora.tokens else set()
    parts = named(merged(model, lora, adapters))
    where = named(placed)

    def replace(name: str, leaf: jax.Array) -> jax.Array:
        if name not in names:
            return leaf
        layers = range(leaf.shape[0]) if "L" in model.placed[name].row.spread else None
        part = parts[name]
        whole = part({}) if layers is None else np.stack([part({0: at}) for at in layers])
        return jax.device_put(whole.astype(np.dtype(dtype)), where[name])

    return map_named(replace, load_params(model, placed, dtype))
