"""A model folder opened for inference: weights on the mesh, tokenizer and template, stop ids.

`evaluate` and `chat` share this, so that what is measured is what one gets. A base model beside a
tuned one gets the tuned one's tokenizer and template: the same tokens go into both.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxtune.cli import note
from jaxtune.config import Config, ConfigError
from jaxtune.data import open as data_open
from jaxtune.data.templating.template import Template
from jaxtune.data.tokenizer import Tokenizer, load_tokenizer
from jaxtune.hf.folders import is_adapter
from jaxtune.hf.load import HfModel, load_params, open_model
from jaxtune.hf.peft.merge import merged_params
from jaxtune.hf.peft.read import on_model, open_adapter
from jaxtune.inference.unstack import unstack
from jaxtune.model import decoder
from jaxtune.model.lora import Lora
from jaxtune.parallel.mesh import check_experts, make_mesh, platform_of, shardings
from jaxtune.spec import ModelSpec
from jaxtune.storage import object_store
from jaxtune.training.checkpoint.checkpoints import read_meta
from jaxtune.training.initial_weights import base_params, param_shardings, restore
from jaxtune.training.program import compute_dtype
from jaxtune.training.run_dir import checkpoint_of, fetched, is_checkpoint, run_config, unexported
from jaxtune.training.subject import open_base


class TextCodec(NamedTuple):
    """A tokenizer and a template: text to token ids and back."""

    tokenizer: Tokenizer
    template: Template


class GenerationModel(NamedTuple):
    """A model ready to generate; `params` are in `dtype`, and any of `stop_ids` ends an answer.

    `adapters` are used as `lora` says, where they are not merged into `params`.
    """

    name: str
    spec: ModelSpec
    params: Any
    stop_ids: frozenset[int]
    dtype: Any
    mesh: Mesh
    lora: Lora | None = None
    adapters: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """The collections that `decoder.forward` takes, with `lora`."""
        if self.lora is None:
            return {"params": self.params}
        return {"params": self.params, "lora": self.adapters}

    def without_adapters(self) -> GenerationModel:
        """Return the base without its unmerged adapters: the same arrays, nothing is loaded."""
        return self._replace(lora=None, adapters=None)


def resolved(config: Config) -> Config:
    """Resolve `model_name_or_path`: a run without an export is its newest checkpoint.

    RUN/checkpoints/STEP brings the config of its run, an adapter the tokenizer beside it, or its
    base's; flags overrule both.
    """
    name = config.model_name_or_path
    if name is None:
        return config
    if "/checkpoints/" in name:
        name = fetched(name)
        config = config.model_copy(update={"model_name_or_path": name})
    elif unexported(name):
        name = f"{name}/checkpoints/{read_meta(Path(name))['step']}"
        note(f"{config.model_name_or_path}: has no exported model; using {name}")
        config = config.model_copy(update={"model_name_or_path": name})
    if is_checkpoint(name):
        own = run_config(checkpoint_of(Path(name))[0], Config())
        # In a written config.yaml every field counts as given, also a tokenizer_name of null.
        tokenizer = config.tokenizer_name or own.tokenizer_name or own.model_name_or_path
        flags = {field: getattr(config, field) for field in config.model_fields_set}
        return own.model_copy(update={**flags, "tokenizer_name": tokenizer})
    if is_adapter(name) and config.tokenizer_name is None:
        adapter = open_adapter(name)
        beside = (adapter.folder / "tokenizer.json").is_file()
        return config.model_copy(update={"tokenizer_name": name if beside else adapter.base})
    return config


def open_codec(config: Config) -> TextCodec:
    """Open the model's tokenizer and template, or those of `tokenizer_name`.

    Raises: ConfigError.
    """
    if config.model_name_or_path is None:
        raise ConfigError("model_name_or_path is not set. Give --model_name_or_path DIR.")
    name = config.tokenizer_name or config.model_name_or_path
    tokenizer = data_open.open_tokenizer(config, name, note=note)
    return TextCodec(tokenizer, data_open.open_template(config, tokenizer, note=note))


def check_base(base: str, codec: TextCodec) -> None:
    """Refuse a base model whose own tokenizer gives other ids to the same text."""
    folder = Path(base).expanduser()
    files = (folder / "tokenizer.json", folder / "hf" / "tokenizer.json")
    if folder.is_dir() and not any(file.is_file() for file in files):
        return
    theirs, ours = load_tokenizer(base), codec.tokenizer
    if theirs.backend.get_vocab() != ours.backend.get_vocab():
        raise ConfigError(
            f"base {base}: its tokenizer has other ids than {ours.folder}, so the same tokens "
            "cannot be put to both. Give the model that the tuned one started from."
        )


def open_mesh(config: Config) -> Mesh:
    """Make the mesh that the config describes."""
    return make_mesh(config.mesh.model_dump())


def positions(name: str, config: Config) -> int:
    """Return how many positions the model `name` has, for prompt and answer; reads no weights."""
    revision = config.revision
    if is_checkpoint(name):
        own = run_config(checkpoint_of(Path(name))[0], Config())
        assert own.model_name_or_path is not None
        name, revision = own.model_name_or_path, own.revision
    elif is_adapter(name):
        adapter = open_adapter(name)
        name, revision = adapter.base, adapter.revision
    return open_model(name, revision=revision, weights=False).spec.max_positions


def load_model(
    name: str, config: Config, codec: TextCodec, mesh: Mesh, *, merge: bool = True
) -> GenerationModel:
    """Load the weights in the computation's dtype, sharded over `mesh`.

    Adapters (of a checkpoint, or of a folder) are merged into the weights; without `merge` they
    stay beside them (see `without_adapters`). With `init: random` a folder without weights gets
    the random ones that training with this seed starts from. Raises: ModelError.
    """
    if is_checkpoint(name) or is_adapter(name):
        return _unstacked(_load_trained(name, config, codec, mesh, merge))
    random = config.init == "random" and not _has_weights(name)
    model = open_model(name, revision=config.revision, weights=not random, note=note)
    check_experts(model.spec.experts, mesh)
    dtype = compute_dtype(config.dtype)
    placed = param_shardings(model.spec, mesh, dtype)
    if random:
        note(f"{name}: no weights there; random ones of seed {config.seed}, as training began")
    params = base_params(model, config, placed, dtype)
    stops = stop_ids(config, codec, model)
    return _unstacked(GenerationModel(name, model.spec, params, stops, dtype, mesh))


def _unstacked(model: GenerationModel) -> GenerationModel:
    """Return the model in the layout that decodes fastest; its former arrays are deleted."""
    platform = platform_of(model.mesh)
    spec, variables = unstack(model.spec, model.variables, platform=platform, consume=True)
    return model._replace(spec=spec, params=variables["params"], adapters=variables.get("lora"))


def _load_trained(
    name: str, config: Config, codec: TextCodec, mesh: Mesh, merge: bool
) -> GenerationModel:
    """Load a run's checkpoint, or an adapter with its base, merged or beside the weights."""
    dtype = compute_dtype(config.dtype)
    if is_checkpoint(name):
        run_dir, step = checkpoint_of(Path(name))
        own = run_config(run_dir, Config())
        model = open_base(own, codec.tokenizer, note=None)
        restored = restore(model, run_dir, step, dtype=own.param_dtype)
        model, lora = restored.model, restored.lora
        leaves = restored.trained["params" if lora is None else "lora"]
    else:
        adapter = open_adapter(name)
        model = open_model(adapter.base, revision=adapter.revision)
        model, lora, leaves = on_model(adapter, model)
    check_experts(model.spec.experts, mesh)
    placed = param_shardings(model.spec, mesh, dtype)
    stops = stop_ids(config, codec, model)
    if lora is not None and not merge:
        lora = replace(lora, dropout=0.0, base="none", double_quant=False)  # the base as it is
        where = shardings(
            decoder.adapter_axes(model.spec, lora),
            decoder.abstract_adapters(model.spec, lora),
            mesh,
        )
        params = load_params(model, placed, dtype)
        leaves = jax.device_put(leaves, where)
        return GenerationModel(name, model.spec, params, stops, dtype, mesh, lora, leaves)
    if lora is None:
        cast = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree))
        params = jax.device_put(cast(leaves), placed)
    else:
        params = merged_params(model, lora, leaves, placed, dtype)
    return GenerationModel(name, model.spec, params, stops, dtype, mesh)


def stop_ids(config: Config, codec: TextCodec, model: HfModel) -> frozenset[int]:
    """Return the ids that end an answer: the trained ends of turn, of the template and of data sets
    with their own, as in an exported model; and those of the model's files."""
    return frozenset({*data_open.stop_ids(config, codec.tokenizer, codec.template), *model.eos_ids})


def _has_weights(name: str) -> bool:

    if object_store.is_url(name):
        return any(item.url.endswith(".safetensors") for item in object_store.listed(name))
    if not Path(name).expanduser().exists():  # a hub id
        return True
    return any(open_model(name, weights=False).folder.glob("*.safetensors"))
