"""The models of a conversation, and the settings of their answers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from jaxtune.config import ConfigError
from jaxtune.data.schema import Message
from jaxtune.inference.generate import Generation, stream
from jaxtune.inference.load import Model, TextCodec
from jaxtune.inference.sampling import Sampling


class ChatSettings(NamedTuple):
    """The fields of `Sampling`, and the longest answer in tokens."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_new_tokens: int = 512


StreamAnswer = Callable[[Sequence[Message], ChatSettings], Generator[str, None, Generation]]


class ChatModel(NamedTuple):
    """A model that answers; `without_adapter` is the same without its adapter, if it has one.

    Both raise `JaxtuneError` for a conversation that does not fit the model.
    """

    label: str
    answer: StreamAnswer
    without_adapter: StreamAnswer | None = None


def sampling_of(settings: ChatSettings) -> Sampling:
    """Check the settings and return their `Sampling`. Raises: ConfigError."""
    if settings.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {settings.max_new_tokens}; expected at least 1.")
    fields = settings._asdict()
    del fields["max_new_tokens"]
    return Sampling(**fields)


def chat_models(models: Mapping[str, Model], codec: TextCodec) -> list[ChatModel]:
    """Make a `ChatModel` of each of `models`, by label, in the order in which they answer."""
    return [
        ChatModel(
            label,
            partial(_answer, model, codec),
            None if model.lora is None else partial(_answer, model.without_adapters(), codec),
        )
        for label, model in models.items()
    ]


def _answer(
    model: Model, codec: TextCodec, messages: Sequence[Message], settings: ChatSettings
) -> Generator[str, None, Generation]:
    sampling, most = sampling_of(settings), settings.max_new_tokens
    return (yield from stream(model, codec, messages, max_new_tokens=most, sampling=sampling))
