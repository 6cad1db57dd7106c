"""Adapters out: a folder that `peft` loads unchanged.

Projections that share a tensor are one module there: their adapters stand side by side in it, A
stacked and B block by block, at a rank as many times larger, which is the same function.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from jax.experimental import multihost_utils

from jaxtune import __version__
from jaxtune.config import ConfigError
from jaxtune.data.templating.template import Template
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.hf.export import replacing, write, write_json, write_tokenizer
from jaxtune.hf.folders import check_replaceable
from jaxtune.hf.load import HfModel
from jaxtune.hf.peft.base_identity import digests
from jaxtune.hf.peft.names import (
    CONFIG,
    MAGNITUDE,
    PREFIX,
    ROWS,
    WEIGHTS,
    A,
    B,
    Leaves,
    adapted,
    first_row,
    in_peft,
    leaf_axes,
    module_of,
    modules_of,
    rows_in,
    table_module,
)
from jaxtune.hf.tensors import fetch, read_header
from jaxtune.model.lora import Lora
from jaxtune.storage import hub
from jaxtune.tree import named


class WrittenAdapter(NamedTuple):
    """A written adapter, whose `tensors` were read back and are those of the model."""

    folder: Path
    tensors: int
    size: int  # bytes


def check_adapter_target(out: Path) -> None:
    """Refuse, before any work, to replace what is no adapter."""
    check_replaceable(out, marker=CONFIG, kind="adapter", export="an adapter")


def write_adapter(
    out: Path,
    *,
    model: HfModel,
    lora: Lora,
    adapters: Any,
    tokenizer: Tokenizer | None,
    template: Template | None,
    revision: str | None = None,
) -> WrittenAdapter:
    """Write the adapters of `model` as `out`, in place of an earlier adapter there.

    With a tokenizer its files lie there too: tokens may have been added to it, and
    `AutoPeftModelForCausalLM` grows the base for them by that. Raises `ConfigError`.
    """
    check_adapter_target(out)
    leaves = on_host(adapters)
    tensors, patterns = _as_peft(model, lora, leaves)
    size = sum(values.nbytes for values in tensors.values())
    try:
        if jax.process_index() == 0:
            with replacing(out, size) as folder:
                config = {**_config(model, lora, revision), **patterns}
                write_json(folder / CONFIG, config)
                text = safetensors.numpy.save(dict(tensors), metadata={"format": "pt"})
                write(folder / WEIGHTS, text)
                if tokenizer is not None:
                    write_tokenizer(folder, model, tokenizer, template)
                write(folder / "README.md", _card(model, lora, config).encode())
                _verify(folder / WEIGHTS, tensors)
        multihost_utils.sync_global_devices("adapter")
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot write the adapter ({size / 1e6:,.1f} MB): {error.strerror or error}."
        ) from None
    return WrittenAdapter(out, len(tensors), size)


def on_host(adapters: Any) -> Leaves:
    """The collection as whole numpy arrays by name, on every host."""

    def whole(leaf: Any) -> np.ndarray:
        if isinstance(leaf, np.ndarray) or leaf.is_fully_addressable:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return {name: whole(leaf) for name, leaf in named(adapters).items()}


def _verify(file: Path, tensors: Leaves) -> None:
    written = read_header(file)
    for name, values in tensors.items():
        read_back = fetch(written[name], tuple(slice(0, n) for n in values.shape))
        if read_back.tobytes() != np.ascontiguousarray(values).tobytes():
            raise ConfigError(f"{file}: {name} reads back other than written. Check the disk.")


def _as_peft(
    model: HfModel, lora: Lora, leaves: Leaves
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """PEFT's tensors, and the entries of its config for modules of another rank."""
    parts: dict[str, list[tuple[str, int]]] = {}  # module -> its projections and their layer
    modules = modules_of(model)
    for name in adapted(leaves):
        for index, module in enumerate(modules[name]):
            parts.setdefault(module, []).append((name, index))
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, made_of in parts.items():
        made_of.sort(key=lambda part: first_row(model, part[0]))
        count = len(made_of)
        whole = rows_in(model, made_of[0][0])
        b = np.zeros((whole, lora.r * count), np.float32)
        for n, block in enumerate(_in_module(model, leaves, "b", made_of)):
            start = first_row(model, made_of[n][0])
            b[start : start + len(block), n * lora.r : (n + 1) * lora.r] = block
        there = f"{PREFIX}{in_peft(model, module)}"
        tensors[f"{there}{A}"] = np.concatenate(_in_module(model, leaves, "a", made_of))
        tensors[f"{there}{B}"] = b
        if lora.dora:
            lengths = _in_module(model, leaves, "magnitude", made_of)
            tensors[f"{there}{MAGNITUDE}"] = np.concatenate(lengths)
        if count > 1:
            key = module.rpartition(".")[2]
            ranks[key] = lora.r * count
            alphas[key] = lora.alpha * (math.sqrt(count) if lora.rslora else count)
    for table in ("embed/table", "head/kernel"):
        rows = leaves.get(f"{table.split('/')[0]}/rows")
        if rows is not None:
            module = in_peft(model, table_module(model, table))
            tensors[f"{PREFIX}{module}{ROWS}"] = rows
    return tensors, {"rank_pattern": ranks, "alpha_pattern": alphas}


def _in_module(
    model: HfModel, leaves: Leaves, leaf: str, parts: Sequence[tuple[str, int]]
) -> list[np.ndarray]:
    """PEFT's A [R in], B [out R] or magnitude [out] of each projection of one layer's module."""
    tensors = []
    for name, layer in parts:
        axes, peft_axes = leaf_axes(model.placed[f"{name}/kernel"])[leaf]
        values = np.einsum(f"{axes}->{peft_axes}", leaves[f"{name}/{leaf}"][layer])
        folded = {"a": (len(values), -1), "b": (-1, values.shape[-1]), "magnitude": (-1,)}[leaf]
        tensors.append(np.ascontiguousarray(values).reshape(folded))
    return tensors


def _config(model: HfModel, lora: Lora, revision: str | None) -> dict[str, Any]:
    """Return the keys for `peft.LoraConfig`; those that are absent have its defaults."""
    tables = ["embed/table", *(() if model.spec.tie_head else ("head/kernel",))]
    tokens = {table_module(model, table).rpartition(".")[2]: list(lora.tokens) for table in tables}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "revision": revision,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "target_modules": _target_modules(model, lora),
        "trainable_token_indices": tokens if lora.tokens else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _target_modules(model: HfModel, lora: Lora) -> list[str]:
    """Short names where they mean the adapted modules and no others, else full ones: also where
    the base has another half, whose modules are not known here."""
    modules = modules_of(model)
    adapted_modules = {m for name in lora.targets or modules for m in modules[name]}
    if model.wrapper is not None:
        return sorted(in_peft(model, module) for module in adapted_modules)
    every = {module_of(piece.name) for placed in model.placed.values() for piece in placed.pieces()}
    short = {module.rpartition(".")[2] for module in adapted_modules}
    meant = {module for module in every if module.rpartition(".")[2] in short}
    return sorted(short if meant == adapted_modules else adapted_modules)


def _card(model: HfModel, lora: Lora, config: Mapping[str, Any]) -> str:
    header = ["library_name: peft", "tags: [jaxtune, sft, lora]"]
    if hub.is_id(model.name) and not Path(model.name).exists():
        header.append(f"base_model: {model.name}")
    kind = " + ".join(("rsLoRA" if lora.rslora else "LoRA", *(("DoRA",) if lora.dora else ())))
    targets = sorted({module.rpartition(".")[2] for module in config["target_modules"]})
    files = "\n".join(f"| `{file}` | `{digest}` |" for file, digest in digests(model).items())
    return "\n".join(
        [
            "---",
            *header,
            "---",
            "",
            f"# Adapter of {Path(model.name).name}",
            "",
            f"{kind} of rank {lora.r}, alpha {lora.alpha:g}, on "
            f"{', '.join(targets)}; trained with "
            f"[jaxtune](https://pypi.org/project/jaxtune/) {__version__}. It belongs to "
            f"`{model.name}`, with these files",
            "(sha256 of size, header and samples of the values):",
            "",
            "| file | digest |",
            "|---|---|",
            files,
            "",
        ]
    )
