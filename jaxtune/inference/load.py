"""A model folder opened to be asked: weights on the mesh, words around them, where answers end.

`evaluate` and `chat` meet here, so that what is measured is what one gets. A base model beside a
tuned one is asked with the tuned one's tokenizer and template: the same tokens go into both.
`answering` asks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtune.cli import note
from jaxtune.config import Config, ConfigError
from jaxtune.storage import object_store

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jaxtune.data.templating.template import Template
    from jaxtune.data.tokenizer import Tokenizer
    from jaxtune.hf.load import HfModel
    from jaxtune.model.lora import Lora
    from jaxtune.spec import ModelSpec


class Words(NamedTuple):
    """How text becomes tokens and back."""

    tokenizer: Tokenizer
    template: Template


class Model(NamedTuple):
    """`params` are in `dtype`, the computation's; any of `stop_ids` ends an answer.

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
        """As `decoder.forward` takes them, with `lora`."""
        if self.lora is None:
            return {"params": self.params}
        return {"params": self.params, "lora": self.adapters}

    def without_adapters(self) -> Model:
        """The base under adapters that are not merged: the same arrays, nothing is loaded."""
        return self._replace(lora=None, adapters=None)


def resolved(config: Config) -> Config:
    """The config to ask a model with: for RUN/checkpoints/STEP that of the run, and for an adapter
    the tokenizer that lies beside it, or its base's. Flags stand above both. A run that exported
    nothing is its newest checkpoint."""
    from jaxtune.hf.folders import is_adapter
    from jaxtune.hf.peft.read import open_adapter
    from jaxtune.training.initial_weights import (
        checkpoint_of,
        fetched,
        is_checkpoint,
        run_config,
        unexported,
    )

    name = config.model_name_or_path
    if name is None:
        return config
    if "/checkpoints/" in name:
        name = fetched(name)
        config = config.model_copy(update={"model_name_or_path": name})
    elif unexported(name):
        from jaxtune.training.checkpoint.checkpoints import read_meta

        name = f"{name}/checkpoints/{read_meta(Path(name))['step']}"
        note(f"{config.model_name_or_path}: has no exported model; asking {name}")
        config = config.model_copy(update={"model_name_or_path": name})
    if is_checkpoint(name):
        own = run_config(checkpoint_of(Path(name))[0], Config())
        # In a written config.yaml every field counts as given, also a tokenizer_name of null.
        tokenizer = config.tokenizer_name or own.tokenizer_name or own.model_name_or_path
        given = {field: getattr(config, field) for field in config.model_fields_set}
        return own.model_copy(update={**given, "tokenizer_name": tokenizer})
    if is_adapter(name) and config.tokenizer_name is None:
        adapter = open_adapter(name)
        beside = (adapter.folder / "tokenizer.json").is_file()
        return config.model_copy(update={"tokenizer_name": name if beside else adapter.base})
    return config


def open_words(config: Config) -> Words:
    """Of the model, or of `tokenizer_name`. Raises `ConfigError`."""
    from jaxtune.data.open import open_template, open_tokenizer

    if config.model_name_or_path is None:
        raise ConfigError("model_name_or_path is not set. Give --model_name_or_path DIR.")
    name = config.tokenizer_name or config.model_name_or_path
    tokenizer = open_tokenizer(config, name, note=note)
    return Words(tokenizer, open_template(config, tokenizer, note=note))


def check_base(base: str, words: Words) -> None:
    """Refuses a base model whose own tokenizer gives other ids to the same text."""
    from jaxtune.data.tokenizer import load_tokenizer

    folder = Path(base).expanduser()
    files = (folder / "tokenizer.json", folder / "hf" / "tokenizer.json")
    if folder.is_dir() and not any(file.is_file() for file in files):
        return
    theirs, ours = load_tokenizer(base), words.tokenizer
    if theirs.backend.get_vocab() != ours.backend.get_vocab():
        raise ConfigError(
            f"base {base}: its tokenizer has other ids than {ours.folder}, so the same tokens "
            "cannot be put to both. Give the model that the tuned one started from."
        )


def open_mesh(config: Config) -> Mesh:
    from jaxtune.parallel.mesh import make_mesh

    return make_mesh(config.mesh.model_dump())


def positions(name: str, config: Config) -> int:
    """How many tokens the model `name` has room for, prompt and answer; reads no weights."""
    from jaxtune.hf.folders import is_adapter
    from jaxtune.hf.load import open_model
    from jaxtune.hf.peft.read import open_adapter
    from jaxtune.training.initial_weights import checkpoint_of, is_checkpoint, run_config

    revision = config.revision
    if is_checkpoint(name):
        own = run_config(checkpoint_of(Path(name))[0], Config())
        assert own.model_name_or_path is not None
        name, revision = own.model_name_or_path, own.revision
    elif is_adapter(name):
        adapter = open_adapter(name)
        name, revision = adapter.base, adapter.revision
    return open_model(name, revision=revision, weights=False).spec.max_positions


def load_model(name: str, config: Config, words: Words, mesh: Mesh, *, merge: bool = True) -> Model:
    """Weights in the computation's dtype, spread over `mesh`.

    Adapters (of a checkpoint, or of a folder) are merged into the weights; without `merge` they
    stay beside them, to be taken away by `without_adapters`. With `init: random` a folder without
    weights is filled with those that training with this seed began with. Raises `ModelError`.
    """
    from jaxtune.hf.folders import is_adapter
    from jaxtune.hf.load import open_model
    from jaxtune.parallel.mesh import check_experts
    from jaxtune.training.initial_weights import base_params, is_checkpoint, param_shardings
    from jaxtune.training.program import compute_dtype

    if is_checkpoint(name) or is_adapter(name):
        return _to_be_asked(_load_trained(name, config, words, mesh, merge))
    random = config.init == "random" and not _has_weights(name)
    model = open_model(name, revision=config.revision, weights=not random, note=note)
    check_experts(model.spec.experts, mesh)
    dtype = compute_dtype(config.dtype)
    placed = param_shardings(model.spec, mesh, dtype)
    if random:
        note(f"{name}: no weights there; random ones of seed {config.seed}, as training began")
    params = base_params(model, config, placed, dtype)
    stops = stop_ids(config, words, model)
    return _to_be_asked(Model(name, model.spec, params, stops, dtype, mesh))


def _to_be_asked(model: Model) -> Model:
    """The same model in the layout that answers fastest; its former arrays are gone."""
    from jaxtune.inference.unstack import unrolled
    from jaxtune.parallel.mesh import platform_of

    platform = platform_of(model.mesh)
    spec, found = unrolled(model.spec, model.variables, platform=platform, consume=True)
    return model._replace(spec=spec, params=found["params"], adapters=found.get("lora"))


def _load_trained(name: str, config: Config, words: Words, mesh: Mesh, merge: bool) -> Model:
    """A checkpoint of a run, or an adapter with its base: adapters merged into the weights, or
    beside them."""
    import jax

    from jaxtune.hf.load import load_params, open_model
    from jaxtune.hf.peft.merge import merged_params
    from jaxtune.hf.peft.read import on_model, open_adapter
    from jaxtune.model import decoder
    from jaxtune.parallel.mesh import check_experts, shardings
    from jaxtune.training.initial_weights import (
        checkpoint_of,
        is_checkpoint,
        param_shardings,
        restore,
        run_config,
    )
    from jaxtune.training.program import compute_dtype
    from jaxtune.training.subject import open_base

    dtype = compute_dtype(config.dtype)
    if is_checkpoint(name):
        run_dir, step = checkpoint_of(Path(name))
        own = run_config(run_dir, Config())
        model = open_base(own, words.tokenizer, note=None)
        restored = restore(model, run_dir, step, dtype=own.param_dtype)
        model, lora = restored.model, restored.lora
        leaves = restored.trained["params" if lora is None else "lora"]
    else:
        adapter = open_adapter(name)
        model = open_model(adapter.base, revision=adapter.revision)
        model, lora, leaves = on_model(adapter, model)
    check_experts(model.spec.experts, mesh)
    placed = param_shardings(model.spec, mesh, dtype)
    stops = stop_ids(config, words, model)
    if lora is not None and not merge:
        lora = replace(lora, dropout=0.0, base="none", double_quant=False)  # the base as it is
        where = shardings(
            decoder.adapter_axes(model.spec, lora),
            decoder.abstract_adapters(model.spec, lora),
            mesh,
        )
        params = load_params(model, placed, dtype)
        leaves = jax.device_put(leaves, where)
        return Model(name, model.spec, params, stops, dtype, mesh, lora, leaves)
    if lora is None:
        cast = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree))
        params = jax.device_put(cast(leaves), placed)
    else:
        params = merged_params(model, lora, leaves, placed, dtype)
    return Model(name, model.spec, params, stops, dtype, mesh)


def stop_ids(config: Config, words: Words, model: HfModel) -> frozenset[int]:
    """What ends an answer: the ends of a turn that were trained, of the template and of data sets
    with one of their own, as in an exported model; and what the model's files say."""
    from jaxtune.data.open import stop_ids as trained

    return frozenset({*trained(config, words.tokenizer, words.template), *model.eos_ids})


def _has_weights(name: str) -> bool:
    from jaxtune.hf.load import open_model

    if object_store.is_url(name):
        return any(item.url.endswith(".safetensors") for item in object_store.listed(name))
    if not Path(name).expanduser().exists():  # a hub id
        return True
    return any(open_model(name, weights=False).folder.glob("*.safetensors"))
