"""A trained model from Python: load it, generate, hold a conversation, measure its loss."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, Unpack, overload

from jaxtune.config import Config, ConfigError, ConfigSource, DataError, load_config
from jaxtune.data.in_memory import dataset_file
from jaxtune.data.schema import Conversation
from jaxtune.evaluation.measured import Inputs, measure
from jaxtune.evaluation.questions import entries_of, open_data
from jaxtune.inference import load as inference_load
from jaxtune.inference.generate import Generation, generate, prompt_ids
from jaxtune.inference.load import GenerationModel, TextCodec, open_codec, open_mesh, resolved
from jaxtune.inference.prompts import parse_prompt
from jaxtune.inference.sampling import GREEDY, Sampling

Messages = Sequence[Mapping[str, Any]]  # a conversation: [{"role": "user", "content": "..."}, ...]


class SamplingFields(TypedDict, total=False):
    """The fields of `Sampling` as keyword arguments; without any of them decoding is greedy."""

    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int


class Loss(NamedTuple):
    """The loss per trained token, over so many `tokens` of `examples`."""

    loss: float
    perplexity: float
    accuracy: float
    tokens: int
    examples: int


def load_model(
    folder: str | os.PathLike[str],
    config: ConfigSource | None = None,
    **overrides: Any,
) -> LoadedModel:
    """Load a model for inference.

    `folder` is a folder in Hugging Face format, a run directory, a checkpoint
    RUN/checkpoints/STEP, or an adapter, which is merged into its base. `config` and `overrides` are
    as in `load_config`: `dtype`, `template`, `mesh`, ...

    Raises: ConfigError, DataError, ModelError.
    """
    overrides["model_name_or_path"] = os.fspath(folder)
    config = resolved(load_config(config, **overrides))
    codec = open_codec(config)
    assert config.model_name_or_path is not None
    model = inference_load.load_model(config.model_name_or_path, config, codec, open_mesh(config))
    return LoadedModel(config, model, codec)


class LoadedModel:
    """A model with its tokenizer and template; prints nothing."""

    def __init__(self, config: Config, model: GenerationModel, codec: TextCodec) -> None:
        self.config = config
        self.messages: list[dict[str, Any]] = []  # of `chat`
        self._model, self._codec = model, codec

    def __repr__(self) -> str:
        return f"LoadedModel({self._model.name!r})"

    @overload
    def generate(
        self,
        prompts: str,
        *,
        max_new_tokens: int = ...,
        stop: str | Sequence[str] = ...,
        chat_template_kwargs: Mapping[str, Any] | None = ...,
        **sampling: Unpack[SamplingFields],
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompts: Iterable[Any],
        *,
        max_new_tokens: int = ...,
        stop: str | Sequence[str] = ...,
        chat_template_kwargs: Mapping[str, Any] | None = ...,
        **sampling: Unpack[SamplingFields],
    ) -> Any: ...
    def generate(
        self,
        prompts: str | Iterable[Any],
        *,
        max_new_tokens: int = 512,
        stop: str | Sequence[str] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **sampling: Unpack[SamplingFields],
    ) -> Generation | list[Generation]:
        """Answer prompts: each result has `text`, `stopped` and `tokens`.

        A prompt is a text or a conversation, a list of messages `{"role": ..., "content": ...}`.
        One prompt gives one result, a list of prompts a list of results, in order. An answer ends
        before the first of the `stop` strings. `chat_template_kwargs` are arguments of the chat
        template (`{"enable_thinking": False}`), above those of the config. Greedy, unless
        `temperature` is given (also `top_k`, `top_p`, `repetition_penalty`, `seed`).

        Raises: ConfigError, DataError.
        """
        if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
            raise DataError(
                "prompts: expected a text, a conversation (a list of messages) or a list of "
                f"these; got {type(prompts).__name__}."
            )
        several = prompts if isinstance(prompts, str) else list(prompts)
        alone = isinstance(several, str) or isinstance(next(iter(several), None), Mapping)
        answers = self._generate(
            [several] if alone else several, max_new_tokens, stop, chat_template_kwargs, sampling
        )
        return answers[0] if alone else answers

    def chat(
        self,
        message: str,
        *,
        max_new_tokens: int = 512,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **sampling: Unpack[SamplingFields],
    ) -> str:
        """Answer a message of the conversation in `messages`, and add both to it."""
        messages = [*self.messages, {"role": "user", "content": message}]
        (answer,) = self._generate([messages], max_new_tokens, (), chat_template_kwargs, sampling)
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        return answer.text

    def reset(self, system: str | None = None) -> None:
        """Begin a new conversation, with a `system` message if there is one."""
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def loss(self, rows: Any) -> Loss:
        """Measure the loss on data as training would see it, weighted by trained tokens.

        `rows` is a list of dicts, as the objects of a data file, or anything else that
        `jaxtune.evaluate` takes as data.

        Raises: ConfigError, DataError.
        """
        entries = entries_of(self.config, dataset_file(rows, name="rows"))
        dataset = open_data(self.config, entries, self._codec)
        inputs = Inputs(self._codec, dataset, None, ())
        measured = measure(self._model, self.config, inputs, max_new_tokens=1, sampling=GREEDY)
        scores = {name: score.point() for name, score in measured.losses.items()}
        return Loss(
            scores["eval_loss"],
            scores["eval_perplexity"],
            scores["eval_token_accuracy"],
            int(measured.tokens.sum()),
            len(dataset),
        )

    def _generate(
        self,
        prompts: Sequence[str | Messages],
        max_new_tokens: int,
        stop: str | Sequence[str],
        template_kwargs: Mapping[str, Any] | None,
        sampling: SamplingFields,
    ) -> list[Generation]:
        unknown = set(sampling) - set(SamplingFields.__annotations__)
        if unknown:
            raise ConfigError(
                f"generate: no such argument: {', '.join(sorted(unknown))}; there are "
                "max_new_tokens, stop, chat_template_kwargs, "
                f"{', '.join(SamplingFields.__annotations__)}."
            )
        conversations = [
            self._parse(prompt, f"prompts[{i}]", template_kwargs)
            for i, prompt in enumerate(prompts)
        ]
        template = self._codec.template
        return generate(
            self._model,
            self._codec,
            [prompt_ids(self._model, self._codec, each) for each in conversations],
            max_new_tokens=max_new_tokens,
            sampling=Sampling(**sampling),
            stop=[stop] if isinstance(stop, str) else stop,
            templates=[template.for_conversation(each) for each in conversations],
        )

    def _parse(
        self, prompt: str | Messages, where: str, template_kwargs: Mapping[str, Any] | None
    ) -> Conversation:
        fields = {
            "prompt": list(prompt) if isinstance(prompt, tuple) else prompt,
            "chat_template_kwargs": None if template_kwargs is None else dict(template_kwargs),
        }
        return parse_prompt(where, fields, self.config.roles).conversation
