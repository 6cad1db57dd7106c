"""Adapters merged into their base: computed from the model folder's own tensors, in float32, a
layer at a time."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtune.hf.layout import Index
from jaxtune.hf.load import HfModel, load_params, read_part
from jaxtune.hf.peft.names import adapted
from jaxtune.hf.peft.write import on_host
from jaxtune.model.lora import Lora, merged_kernel
from jaxtune.tree import unnamed


def merged(model: HfModel, lora: Lora, adapters: Any) -> Any:
    """A tree for `export_model`: each leaf a function that gives a part of the merged parameter.

    The base is read anew from the model folder, in float32, whatever was trained on: merging into
    quantised or rounded weights would keep their error.
    """
    parts = _Merged(model, lora, adapters)

    def part(at: Mapping[int, int], *, name: str) -> np.ndarray:
        index = tuple(
            slice(at[axis], at[axis] + 1) if axis in at else slice(0, size)
            for axis, size in enumerate(model.placed[name].shape)
        )
        return parts.read(name, index, np.float32).squeeze(tuple(at))

    return unnamed({name: functools.partial(part, name=name) for name in model.placed})


def merged_params(model: HfModel, lora: Lora, adapters: Any, placed: Any, dtype: Any) -> Any:
    """The merged parameters in `dtype`, each leaf in its sharding of the tree `placed`.

    A host reads the slices of its own devices, once (with DoRA whole outputs), and holds a layer of
    one in float32; nothing lies on a device twice.
    """
    parts = _Merged(model, lora, adapters)

    def read(name: str, index: Index) -> np.ndarray:
        return parts.read(name, index, dtype)

    return load_params(model, placed, dtype, read=read)


class _Merged:
    """Merged parameters by slices."""

    def __init__(self, model: HfModel, lora: Lora, adapters: Any) -> None:
        self._model, self._lora = model, lora
        self._leaves = on_host(adapters)
        self._projections = set(adapted(self._leaves))

    def read(self, name: str, index: Index, dtype: Any) -> np.ndarray:
        """`index` of parameter `name`, rounded to `dtype` at the end."""
        module, _, leaf = name.rpartition("/")
        if leaf == "kernel" and module in self._projections:
            layers = range(self._model.placed[name].shape[0])[index[0]]
            first = self._layer(module, layers[0], index[1:])
            values = np.empty((len(layers), *first.shape), np.dtype(dtype))
            values[0] = first
            for at, layer in enumerate(layers[1:], 1):
                values[at] = self._layer(module, layer, index[1:])
            return values
        values = read_part(self._model, name, index, dtype)
        if leaf in ("table", "kernel") and f"{module}/rows" in self._leaves:
            self._put_rows(name, self._leaves[f"{module}/rows"], values, index)
        return values

    def _layer(self, module: str, layer: int, index: Index) -> np.ndarray:
        """`index` of one layer's kernel, f32."""
        placed = self._model.placed[f"{module}/kernel"]
        letters = "".join(placed.row.axes[1:])
        shared = "".join(letter for letter in letters if letter in placed.row.groups[1])
        added = "".join(letter for letter in letters if letter not in shared)
        cut = dict(zip(letters, index, strict=True))
        rest: Index = (slice(None),) * len(letters)
        if f"{module}/magnitude" in self._leaves:  # of whole outputs: all that is summed over
            rest = tuple(cut[x] if x in shared else slice(None) for x in letters)
            cut |= dict.fromkeys(shared, slice(None))
        own = {
            key: self._leaves[f"{module}/{key}"][layer][
                tuple(cut.get(letter, slice(None)) for letter in of)
            ]
            for key, of in (("a", f"{shared}R"), ("b", f"R{added}"), ("magnitude", added))
            if f"{module}/{key}" in self._leaves
        }
        here = (slice(layer, layer + 1), *cut.values())
        kernel = read_part(self._model, placed.parameter, here)[0]
        return merged_kernel(own, kernel, letters, shared, self._lora)[rest]

    def _put_rows(self, name: str, rows: np.ndarray, values: np.ndarray, index: Index) -> None:
        """The trained `rows` [N D] of tokens into `values`, `index` of a table [V D] or [D V]."""
        placed = self._model.placed[name]
        of_token = placed.row.axes.index("V")
        there = range(placed.shape[of_token])[index[of_token]]
        by_token = np.moveaxis(values, of_token, 0)
        for row, token in zip(rows[:, index[1 - of_token]], self._lora.tokens, strict=True):
            if token in there:
                by_token[token - there.start] = row
