"""The models of a conversation, and the settings of their answers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from jaxtune.config import ConfigError
from jaxtune.data.schema import Message
from jaxtune.inference.generate import Generation, stream
from jaxtune.inference.load import GenerationModel, TextCodec
from jaxtune.inference.sampling import Sampling


@dataclass(frozen=True)
class ChatSettings(Sampling):
    """A way to draw an answer, and its longest length in tokens. Raises: ConfigError."""

    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1.")


StreamAnswer = Callable[[Sequence[Message], ChatSettings], Generator[str, None, Generation]]


class ChatModel(NamedTuple):
    """A model that answers; `without_adapter` is the same without its adapter, if it has one.

    Both raise `JaxtuneError` for a conversation that does not fit the model.
    """

    label: str
    answer: StreamAnswer
    without_adapter: StreamAnswer | None = None


def chat_models(models: Mapping[str, GenerationModel], codec: TextCodec) -> list[ChatModel]:
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
    model: GenerationModel, codec: TextCodec, messages: Sequence[Message], settings: ChatSettings
) -> Generator[str, None, Generation]:
    most = settings.max_new_tokens
    return (yield from stream(model, codec, messages, max_new_tokens=most, sampling=settings))
