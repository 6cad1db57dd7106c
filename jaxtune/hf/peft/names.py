"""PEFT's names for the parts of an adapter, and the modules of transformers of each projection.

    adapter_config.json          what is adapted and how; the base by name
    adapter_model.safetensors    base_model.model.{module}.lora_A.weight [R in], lora_B [out R], ...

Modules have the names of the family's rows. Several projections in one tensor (q, k and v in
qkv_proj) are one module there. Where the base is the text half of a model of text and images, PEFT
adapts the whole model, in which they have a prefix more: `in_peft`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxtune.config import ModelError
from jaxtune.hf.folders import ADAPTER as CONFIG
from jaxtune.hf.layout import Placed
from jaxtune.hf.load import HfModel
from jaxtune.model import decoder

__all__ = ["CONFIG"]

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
ROWS = ".token_adapter.trainable_tokens_delta"

Leaves = Mapping[str, np.ndarray]  # names in the collection "lora" -> values on this host


def modules_of(model: HfModel) -> dict[str, tuple[str, ...]]:
    """Projection -> the modules of transformers it is or is a part of, one per layer."""
    return {
        name: tuple(module_of(piece.name) for piece in model.placed[f"{name}/kernel"].pieces())
        for name in decoder.projections(model.spec)
    }


def module_of(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def in_peft(model: HfModel, module: str) -> str:
    """The module in the model that transformers loads from the base's folder."""
    return module if model.wrapper is None else model.wrapper.module(module)


def spellings(model: HfModel, module: str) -> tuple[str, ...]:
    """`in_peft`, what it was in transformers 4, and the name in a model of text alone."""
    return (module,) if model.wrapper is None else model.wrapper.names(module)


def table_module(model: HfModel, parameter: str) -> str:
    return module_of(next(model.placed[parameter].pieces()).name)


def rows_in(model: HfModel, name: str) -> int:
    return model.placed[f"{name}/kernel"].tensor_shape[0]


def first_row(model: HfModel, name: str) -> int:
    """The first row of a projection in its tensor."""
    part = model.placed[f"{name}/kernel"].part
    if part is not None and part.step != 1:
        raise ModelError(f"{model.name}: {name} takes turns with others; it has no PEFT adapter.")
    return 0 if part is None else part.start


def leaf_axes(placed: Placed) -> dict[str, tuple[str, str]]:
    """A leaf of one layer's adapter -> its axes here, and those of PEFT's tensor, unfolded.

    Of o_proj: {"a": ("HKR", "RHK"), "b": ("RD", "DR"), "magnitude": ("D", "D")}.
    """
    outputs, inputs = ("".join(group) for group in placed.row.groups)
    shared = "".join(axis for axis in placed.row.axes if axis in inputs)
    added = "".join(axis for axis in placed.row.axes if axis in outputs)
    return {
        "a": (f"{shared}R", f"R{inputs}"),
        "b": (f"R{added}", f"{outputs}R"),
        "magnitude": (added, outputs),
    }


def adapted(leaves: Leaves) -> list[str]:
    return [name.removesuffix("/a") for name in leaves if name.endswith("/a")]
