"""Sources of a run's weights: a model folder, a seed, an adapter, a checkpoint.

All commands use it, so that what is evaluated is what was trained.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxtune import cli
from jaxtune.config import Config, ConfigError
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.hf.load import HfModel, load_params
from jaxtune.hf.peft.base_identity import check_base, lora_from_meta
from jaxtune.hf.peft.merge import merged
from jaxtune.hf.peft.read import with_token_rows
from jaxtune.model import decoder, quantise
from jaxtune.model.lora import Lora
from jaxtune.parallel.mesh import make_mesh, put, shardings
from jaxtune.spec import ModelSpec
from jaxtune.training.checkpoint.checkpoints import read_meta, restore_trained
from jaxtune.training.trainable import trainable_subset
from jaxtune.tree import merge, named, split


class Adapters(NamedTuple):
    """A run's adapters, which it trains beside a frozen base.

    `start` is where it goes on from, as numpy arrays, or None for new adapters.
    """

    lora: Lora
    start: Any | None


# -- a run's beginning ---------------------------------------------------------------------------


def base_params(
    model: HfModel, config: Config, placed: Any, dtype: Any, *, lora: Lora | None = None
) -> Any:
    """The model's parameters in `dtype`, each leaf in its sharding of the tree `placed`; the
    kernels of projections and experts as `lora.base` says, made smaller one by one while loading.

    A model opened without weights (`init: random`) is filled from the seed, in `param_dtype` first,
    so that everybody who asks for another `dtype` begins with the same numbers.
    """
    if lora is not None and lora.base != "none":
        return _quantised_params(model, lora, placed, dtype)
    if model.tensors:
        return load_params(model, placed, dtype)

    def first(key: jax.Array) -> Any:
        params = decoder.init(model.spec, key, config.param_dtype)
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    return jax.jit(first, out_shardings=placed)(jax.random.key(config.seed))


def param_shardings(spec: ModelSpec, mesh: Mesh, dtype: Any) -> Any:
    """Return the shardings of plain parameters on `mesh`."""
    return shardings(decoder.axes(spec), decoder.abstract(spec, dtype), mesh)


def _quantised_params(model: HfModel, lora: Lora, placed: Any, dtype: Any) -> Any:
    projections = {f"{name}/kernel" for name in decoder.projections(model.spec)}
    banks = {f"{name}/kernel" for name in decoder.banks(model.spec)}
    where = named(placed)
    whole = param_shardings(model.spec, next(iter(where.values())).mesh, dtype)

    def smaller(name: str, leaf: jax.Array) -> Any:
        if name not in projections | banks:
            return leaf
        inputs = 1 if name in banks else len(model.placed[name].row.groups[1])
        placed_parts = {
            key.rpartition("/")[2]: sharding
            for key, sharding in where.items()
            if key.startswith(f"{name}/")
        }
        of_one = functools.partial(
            quantise.quantise, kind=lora.base, inputs=inputs, double=lora.double_quant
        )
        of_layer = functools.partial(jax.lax.map, of_one) if name in banks else of_one
        # A kernel at a time: in float32 a whole stack would not fit beside the rest.
        every = jax.jit(functools.partial(jax.lax.map, of_layer), out_shardings=placed_parts)
        return jax.block_until_ready(every(leaf))

    return load_params(model, whole, dtype, then=smaller)


def check_ids(largest: int, model: str, spec: ModelSpec, tokenizer: Tokenizer) -> None:
    """An id without a row in the embedding never raises on a device: it is refused here."""
    if largest >= spec.vocab:
        raise ConfigError(
            f"{model}: has {spec.vocab} embedding rows, but meets token id {largest} of tokenizer "
            f"{tokenizer.folder}. Use the model's own tokenizer."
        )


def first_adapters(
    spec: ModelSpec, adapters: Adapters, params: Any, placed: Any, *, seed: int
) -> Any:
    """The collection "lora" a run begins with, in the shardings `placed`."""
    if adapters.start is not None:
        return jax.tree.map(put, adapters.start, placed)
    make = functools.partial(decoder.init_adapters, spec, adapters.lora)
    # Not the key of the base's random weights, nor of what is drawn while training.
    key = jax.random.fold_in(jax.random.key(seed), 2**31)
    return jax.jit(make, out_shardings=placed)(params, key)


# -- trained weights as parameters ---------------------------------------------------------------


class Restored(NamedTuple):
    """A checkpoint's trained variables, for `model`; without `lora` all parameters, those that
    were frozen read from the base."""

    model: HfModel
    trained: Any
    lora: Lora | None
    step: int


def restore(model: HfModel, run_dir: Path, step: int | None, *, dtype: str) -> Restored:
    """Restore the variables that a run trained, spread over the devices that are here."""
    meta = read_meta(run_dir, step, note=cli.note)
    mesh = make_mesh({"fsdp": -1})
    lora = lora_from_meta(meta["lora"]) if "lora" in meta else None
    chosen = trainable_subset(model.spec, **meta["part"]) if "part" in meta else None
    if chosen is not None:
        check_base(meta, model, where=str(run_dir))
        model = replace(model, spec=chosen.spec)
    if lora is None:
        axes = {"params": decoder.axes(model.spec)}
        abstract = {"params": decoder.abstract(model.spec, dtype)}
    else:
        check_base(meta, model, where=str(run_dir))
        model = with_token_rows(model, lora.tokens)
        axes = {"lora": decoder.adapter_axes(model.spec, lora)}
        abstract = {"lora": decoder.abstract_adapters(model.spec, lora)}
    step, placed = int(meta["step"]), shardings(axes, abstract, mesh)
    if chosen is None:
        trained = restore_trained(run_dir, abstract, placed, step=step)
        return Restored(model, trained, lora, step)
    abstract, _ = split(abstract, chosen.is_trained)
    moved = restore_trained(run_dir, abstract, split(placed, chosen.is_trained)[0], step=step)
    base = {"params": load_params(model, placed["params"], dtype)}
    return Restored(model, merge(moved, split(base, chosen.is_trained)[1]), None, step)


def to_export(restored: Restored) -> Any:
    """The whole parameters as `export_model` takes them, adapters merged."""
    if restored.lora is None:
        return restored.trained["params"]
    return merged(restored.model, restored.lora, restored.trained["lora"])
