"""A model folder opened to be asked: weights on the mesh, words around them, where answers end.

`evaluate` and `chat` meet here, so that what is measured is what one gets. A base model beside a
tuned one is asked with the tuned one's tokenizer and template: the same tokens go into both.

    answer(model, words, prompts, ...)     many answers, in order
    stream(model, words, messages, ...)    one, piece by piece
    Answering(model, words, slots=8)       any number at any time, which both of them use
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtune import stores
from jaxtune.command import note
from jaxtune.config import Config, ConfigError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jaxtune.data.content import Around
    from jaxtune.data.schema import Conversation, Message
    from jaxtune.data.template import Template
    from jaxtune.data.tokenizer import Tokenizer
    from jaxtune.hf.load import HfModel
    from jaxtune.model.lora import Lora
    from jaxtune.model.sampling import Sampling
    from jaxtune.spec import ModelSpec


_ROWS = 32  # answered at a time


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


class Answer(NamedTuple):
    """`text` is the content of a message, without what the template writes around that (see
    `data.content`). `stopped`: the model ended it, or a stop string did; `tokens`: how many were
    made for it, without the stop id, with a stop string's."""

    text: str
    stopped: bool
    tokens: int


class Piece(NamedTuple):
    """More text of a request; with the last piece of it the whole `answer`."""

    request: int
    text: str
    answer: Answer | None


def resolved(config: Config) -> Config:
    """The config to ask a model with: for RUN/checkpoints/STEP that of the run, and for an adapter
    the tokenizer that lies beside it, or its base's. Flags stand above both. A run that exported
    nothing is its newest checkpoint."""
    from jaxtune.hf.adapter_read import open_adapter
    from jaxtune.hf.folders import is_adapter
    from jaxtune.weights import checkpoint_of, fetched, is_checkpoint, run_config, unexported

    name = config.model_name_or_path
    if name is None:
        return config
    if "/checkpoints/" in name:
        name = fetched(name)
        config = config.model_copy(update={"model_name_or_path": name})
    elif unexported(name):
        from jaxtune.learn.checkpoint import read_meta

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


def positions(name: str, config: Config) -> int:
    """How many tokens the model `name` has room for, prompt and answer; reads no weights."""
    from jaxtune.hf.adapter_read import open_adapter
    from jaxtune.hf.folders import is_adapter
    from jaxtune.hf.load import open_model
    from jaxtune.weights import checkpoint_of, is_checkpoint, run_config

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
    from jaxtune.learn.program import compute_dtype
    from jaxtune.mesh import check_experts
    from jaxtune.weights import base_params, is_checkpoint, param_shardings

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
    from jaxtune.mesh import platform_of
    from jaxtune.model.unrolled import unrolled

    platform = platform_of(model.mesh)
    spec, found = unrolled(model.spec, model.variables, platform=platform, consume=True)
    return model._replace(spec=spec, params=found["params"], adapters=found.get("lora"))


def _load_trained(name: str, config: Config, words: Words, mesh: Mesh, merge: bool) -> Model:
    """A checkpoint of a run, or an adapter with its base: adapters merged into the weights, or
    beside them."""
    import jax

    from jaxtune.hf.adapter_read import on_model, open_adapter
    from jaxtune.hf.load import load_params, open_model, with_tokens
    from jaxtune.hf.merge import merged_params
    from jaxtune.learn.program import compute_dtype
    from jaxtune.mesh import check_experts, shardings
    from jaxtune.model import decoder
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
    from jaxtune.data.asked import stop_ids as trained

    return frozenset({*trained(config, words.tokenizer, words.template), *model.eos_ids})


def prompt_ids(model: Model, words: Words, asked: Conversation) -> list[int]:
    """What is fed for a conversation: the beginning of the row that training would make of it."""
    from jaxtune.data.encode import encode_prompt
    from jaxtune.weights import check_ids

    ids = encode_prompt(words.template, words.tokenizer, asked.messages, tools=asked.tools)
    check_ids(max(ids, default=0), model.name, model.spec, words.tokenizer)
    return ids


def answer(
    model: Model,
    words: Words,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    templates: Sequence[Template] | None = None,
    between: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """The answer to each of `prompt_ids`, in order: greedy, or drawn as `sampling` says, prompt i
    with random numbers of its own. `templates` are those of the prompts, where they are not that of
    `words`. `between` is called as it goes, as often on every host. Raises `DataError` for a prompt
    too long, and what `between` raises."""
    from jaxtune.model.sample import by_length

    if not prompts:
        return []
    desk = Answering(model, words, slots=min(_ROWS, len(prompts)))
    requests = {
        desk.ask(
            prompts[i],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            template=words.template if templates is None else templates[i],
            number=i,
        ): i
        for i in by_length(prompts)
    }
    found: dict[int, Answer] = {}
    while desk.busy:
        between()
        for piece in desk.step():
            if piece.answer is not None:
                found[requests[piece.request]] = piece.answer
    return [found[i] for i in range(len(prompts))]


def stream(
    model: Model,
    words: Words,
    conversation: Sequence[Message],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
) -> Generator[str, None, Answer]:
    """`answer` for one conversation, yielding text as it comes; the pieces make up the answer.

    Raises `DataError` here, before the first piece is asked for.
    """
    from jaxtune.data.schema import Conversation

    prompt = prompt_ids(model, words, Conversation(tuple(conversation)))
    desk = Answering(model, words, slots=1)
    desk.ask(
        prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        template=words.template,
    )
    return _pieces(desk)


def _pieces(desk: Answering) -> Generator[str, None, Answer]:
    while True:
        for piece in desk.step(1):
            if piece.text:
                yield piece.text
            if piece.answer is not None:
                return piece.answer


class Answering:
    """`model.sample.Engine` in words: any number of requests, `slots` of them answered at a time,
    first come, first served; what a request is answered depends on no other.

        request = desk.ask(prompt_ids(model, words, conversation), max_new_tokens=256)
        while desk.busy:
            for piece in desk.step():        # Piece(request, "text", None), the last with an answer
                ...

    An answer ends before the first of its `stop` strings, wherever tokens begin and end; nothing
    that may turn out to be one, or to be the template's, is shown before it is known. To be used by
    one thread.
    """

    def __init__(
        self, model: Model, words: Words, *, slots: int = 8, max_length: int | None = None
    ) -> None:
        from jaxtune.model.sample import Engine

        self._engine = Engine(
            model.spec,
            model.variables,
            dtype=model.dtype,
            slots=slots,
            mesh=model.mesh,
            lora=model.lora,
            max_length=max_length,
        )
        self._stop_ids, self._words = model.stop_ids, words
        self._texts: dict[int, _Text] = {}

    @property
    def busy(self) -> bool:
        """Whether any request is being answered or waits."""
        return self._engine.busy

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return self._engine.waiting

    def ask(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        template: Template | None = None,
        number: int = 0,
    ) -> int:
        """The request's number. `template` is that of the prompt: what it writes around content is
        left out, and its end of turn ends the answer; without one the text is what goes on behind
        the prompt. Random numbers follow from `sampling.seed` and `number` alone; see
        `Engine.submit`. Raises `ConfigError` and `DataError`."""
        from jaxtune.data.content import Around, around
        from jaxtune.model.sampling import GREEDY

        if any(not text for text in stop):
            raise ConfigError("stop: has an empty string, which every answer begins with. Drop it.")
        request = self._engine.submit(
            prompt,
            max_new_tokens=max_new_tokens,
            stop_ids=self._stop_ids if template is None else {*self._stop_ids, template.stop_id},
            sampling=sampling or GREEDY,
            number=number,
        )
        tokenizer, own = self._words.tokenizer, template or self._words.template
        left_out = Around() if template is None else around(template, tokenizer)
        self._texts[request] = _Text(tokenizer, own.stop_id, tuple(stop), left_out)
        return request

    def cancel(self, request: int) -> None:
        """Ends a request, which has no piece after this; one that ended is ignored."""
        self._engine.cancel(request)
        self._texts.pop(request, None)

    def give_up(self) -> int:
        """After a `step` that raised for want of memory: the request that is ended, so that the
        others can go on. See `Engine.give_up`."""
        request = self._engine.give_up()
        del self._texts[request]
        return request

    def step(self, most: int | None = None) -> list[Piece]:
        """Some work, with what came of it: prompts read, or up to `most` tokens of each answer."""
        events = self._engine.step() if most is None else self._engine.step(most)
        pieces = []
        for event in events:
            text = self._texts[event.request]
            shown, found = text.add(event.tokens, event.reason)
            if found is not None:
                self.cancel(event.request)
            pieces.append(Piece(event.request, shown, found))
        return pieces


@dataclass
class _Text:
    """The text of one answer while its tokens come, without what is `around` it."""

    tokenizer: Tokenizer
    behind: int  # a token to be decoded behind
    stop: tuple[str, ...]
    around: Around
    ids: list[int] = field(default_factory=list)
    shown: str = ""

    def add(self, ids: Sequence[int], reason: str | None) -> tuple[str, Answer | None]:
        """What can be shown now, and the answer, if this ends it: for a reason, or with a stop."""
        self.ids += ids
        text = self._said(len(self.ids))
        at = _first(self.stop, text)
        if at is not None:
            # However many tokens came at once, the answer has those that it took to say the stop.
            before = len(self.ids) - len(ids)
            for count in range(before + 1, len(self.ids) + 1):
                whole = self._said(count)
                if (found := _first(self.stop, whole)) is not None:
                    return self._show(whole[:found]), Answer(whole[:found], True, count)
        if reason is not None:
            if reason == "stop":
                text = text.removesuffix(self.around.behind)
            return self._show(text), Answer(text, reason == "stop", len(self.ids))
        # A character of several tokens decodes to U+FFFD until its last one is there.
        if not text.startswith(self.shown) or text.endswith("\ufffd"):
            return "", None
        # All of what stands behind an answer may be its end, a stop string would have ended it.
        ends = (*self.stop, self.around.behind + "\0")
        return self._show(text[: len(text) - _begun(ends, text)]), None

    def _said(self, count: int) -> str:
        """By the first `count` tokens; nothing while that may be what stands before content."""
        from jaxtune.data.content import text_of

        text = text_of(self.tokenizer, self.ids[:count], behind=self.behind)
        before = self.around.before
        return "" if before.startswith(text) else text.removeprefix(before)

    def _show(self, text: str) -> str:
        new = text[len(self.shown) :]
        self.shown += new
        return new


def _first(stop: Sequence[str], text: str) -> int | None:
    """Where the first of the stop strings begins, None without one."""
    return min((at for each in stop if (at := text.find(each)) >= 0), default=None)


def _begun(stop: Sequence[str], text: str) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    longest = min(len(text), max(map(len, stop), default=1) - 1)
    ends = (size for size in range(longest, 0, -1) if _begins(stop, text[-size:]))
    return next(ends, 0)


def _begins(stop: Sequence[str], end: str) -> bool:
    return any(each.startswith(end) for each in stop)


def _has_weights(name: str) -> bool:
    from jaxtune.hf.load import open_model

    if stores.is_url(name):
        return any(item.url.endswith(".safetensors") for item in stores.listed(name))
    if not Path(name).expanduser().exists():  # a hub id
        return True
    return any(open_model(name, weights=False).folder.glob("*.safetensors"))
