"""A model folder opened to be asked: weights on the mesh, words around them, where answers end.

`evaluate` and `chat` meet here, so that what is measured is what one gets. A base model beside a
tuned one is asked with the tuned one's tokenizer and template: the same tokens go into both.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtune import stores
from jaxtune.command import note
from jaxtune.config import Config, ConfigError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jaxtune.data.schema import Conversation, Message
    from jaxtune.data.template import Template
    from jaxtune.data.tokenizer import Tokenizer
    from jaxtune.hf.load import HfModel
    from jaxtune.spec import ModelSpec


class Words(NamedTuple):
    """How text becomes tokens and back."""

    tokenizer: Tokenizer
    template: Template


class Model(NamedTuple):
    """`params` are in `dtype`, the computation's; any of `stop_ids` ends an answer."""

    name: str
    spec: ModelSpec
    params: Any
    stop_ids: frozenset[int]
    dtype: Any
    mesh: Mesh


class Answer(NamedTuple):
    """`stopped`: the model ended it; `tokens`: how many it has, without the stop."""

    text: str
    stopped: bool
    tokens: int


def resolved(config: Config) -> Config:
    """The config to ask a model with: for RUN/checkpoints/STEP that of the run, and for an adapter
    the tokenizer that lies beside it, or its base's. Flags stand above both."""
    from jaxtune.hf.adapter_read import open_adapter
    from jaxtune.hf.folders import is_adapter
    from jaxtune.weights import checkpoint_of, fetched, is_checkpoint, run_config

    name = config.model_name_or_path
    if name is None:
        return config
    if "/checkpoints/" in name:
        name = fetched(name)
        config = config.model_copy(update={"model_name_or_path": name})
    if is_checkpoint(name):
        own = run_config(checkpoint_of(Path(name))[0], Config())
        tokenizer = own.tokenizer_name or own.model_name_or_path
        given = {field: getattr(config, field) for field in config.model_fields_set}
        return own.model_copy(update={"tokenizer_name": tokenizer, **given})
    if is_adapter(name) and config.tokenizer_name is None:
        adapter = open_adapter(name)
        beside = (adapter.folder / "tokenizer.json").is_file()
        return config.model_copy(update={"tokenizer_name": name if beside else adapter.base})
    return config


def open_words(config: Config) -> Words:
    """Of the model, or of `tokenizer_name`. Raises `ConfigError`."""
    from jaxtune.data.asked import open_template, open_tokenizer

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
    from jaxtune.mesh import make_mesh

    return make_mesh(config.mesh.model_dump())


def load_model(name: str, config: Config, words: Words, mesh: Mesh) -> Model:
    """Weights in the computation's dtype, spread over `mesh`.

    With `init: random` a folder without weights is filled with those that training with this seed
    began with. Raises `ModelError`.
    """
    from jaxtune.hf.folders import is_adapter
    from jaxtune.hf.load import open_model
    from jaxtune.learn.program import compute_dtype
    from jaxtune.weights import base_params, is_checkpoint, param_shardings

    if is_checkpoint(name) or is_adapter(name):
        return _load_trained(name, config, words, mesh)
    random = config.init == "random" and not _has_weights(name)
    model = open_model(name, revision=config.revision, weights=not random, note=note)
    dtype = compute_dtype(config.dtype)
    placed = param_shardings(model.spec, mesh, dtype)
    if random:
        note(f"{name}: no weights there; random ones of seed {config.seed}, as training began")
    params = base_params(model, config, placed, dtype)
    return Model(name, model.spec, params, stop_ids(words, model), dtype, mesh)


def _load_trained(name: str, config: Config, words: Words, mesh: Mesh) -> Model:
    """A checkpoint of a run, or an adapter with its base: adapters merged into the weights."""
    import jax

    from jaxtune.hf.adapter_read import on_model, open_adapter
    from jaxtune.hf.load import open_model, with_tokens
    from jaxtune.hf.merge import merged_params
    from jaxtune.learn.program import compute_dtype
    from jaxtune.weights import (
        checkpoint_of,
        is_checkpoint,
        param_shardings,
        restore,
        run_config,
    )

    dtype = compute_dtype(config.dtype)
    if is_checkpoint(name):
        run_dir, step = checkpoint_of(Path(name))
        own = run_config(run_dir, Config())
        assert own.model_name_or_path is not None
        pretrained = own.init == "pretrained"
        model = open_model(own.model_name_or_path, revision=own.revision, weights=pretrained)
        added = words.tokenizer.added.values()
        model = with_tokens(model, added, trained=words.tokenizer.size - len(added))
        restored = restore(model, run_dir, step, dtype=own.param_dtype)
        model, lora = restored.model, restored.lora
        leaves = restored.trained["params" if lora is None else "lora"]
    else:
        adapter = open_adapter(name)
        model = open_model(adapter.base, revision=adapter.revision)
        model, lora, leaves = on_model(adapter, model)
    placed = param_shardings(model.spec, mesh, dtype)
    if lora is None:
        cast = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree))
        params = jax.device_put(cast(leaves), placed)
    else:
        params = merged_params(model, lora, leaves, placed, dtype)
    return Model(name, model.spec, params, stop_ids(words, model), dtype, mesh)


def stop_ids(words: Words, model: HfModel) -> frozenset[int]:
    """What ends an answer: the template's end of a turn, and what the model's files say."""
    return frozenset({words.template.stop_id, *model.eos_ids})


def prompt_ids(model: Model, words: Words, asked: Conversation) -> list[int]:
    """What is fed for a conversation: the beginning of the row that training would make of it."""
    from jaxtune.data.encode import encode_prompt
    from jaxtune.weights import check_ids

    ids = encode_prompt(words.template, words.tokenizer, asked.messages, tools=asked.tools)
    check_ids(max(ids, default=0), model.name, model.spec, words.tokenizer)
    return ids


def answer(
    model: Model, words: Words, prompts: Sequence[Sequence[int]], *, max_new_tokens: int
) -> list[Answer]:
    """The greedy answer to each of `prompt_ids`, in order. Raises `DataError` for one too long."""
    from jaxtune.model.sample import generate

    generations = generate(
        model.spec,
        model.params,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=model.stop_ids,
        dtype=model.dtype,
        mesh=model.mesh,
    )
    decode = words.tokenizer.decode
    return [Answer(decode(g.tokens), g.stopped, len(g.tokens)) for g in generations]


def stream(
    model: Model, words: Words, conversation: Sequence[Message], *, max_new_tokens: int
) -> Generator[str, None, Answer]:
    """`answer` for one conversation, yielding text as it comes; the pieces make up the answer.

    Raises `DataError` here, before the first piece is asked for.
    """
    from jaxtune.data.schema import Conversation
    from jaxtune.model import sample

    tokens = sample.stream(
        model.spec,
        model.params,
        prompt_ids(model, words, Conversation(tuple(conversation))),
        max_new_tokens=max_new_tokens,
        stop_ids=model.stop_ids,
        dtype=model.dtype,
        mesh=model.mesh,
    )
    return _as_text(tokens, words.tokenizer)


def _as_text(
    tokens: Generator[int, None, bool], tokenizer: Tokenizer
) -> Generator[str, None, Answer]:
    ids: list[int] = []
    shown = ""
    while True:
        try:
            ids.append(next(tokens))
        except StopIteration as end:
            text = tokenizer.decode(ids)
            if text != shown:
                yield text[len(shown) :]
            return Answer(text, bool(end.value), len(ids))
        text = tokenizer.decode(ids)
        # A character of several tokens decodes to U+FFFD until its last one is there.
        if text.startswith(shown) and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text


def _has_weights(name: str) -> bool:
    from jaxtune.hf.load import open_model

    if stores.is_url(name):
        return any(item.url.endswith(".safetensors") for item in stores.listed(name))
    if not Path(name).expanduser().exists():  # a hub id
        return True
    return any(open_model(name, weights=False).folder.glob("*.safetensors"))
