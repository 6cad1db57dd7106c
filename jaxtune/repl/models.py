"""Who answers in a conversation, and how answers are drawn."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from jaxtune.config import ConfigError
from jaxtune.data.schema import Message

if TYPE_CHECKING:
    from jaxtune.inference.load import Model, TextCodec
    from jaxtune.inference.sampling import Sampling


class Settings(NamedTuple):
    """The fields of `model.sampling.Sampling`, and how long an answer may become, in tokens."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_new_tokens: int = 512


class Ended(NamedTuple):
    """`stopped`: the model ended the answer; otherwise `full` says that no position was left."""

    stopped: bool
    full: bool


Say = Callable[[Sequence[Message], Settings], Generator[str, None, Ended]]


class Voice(NamedTuple):
    """One who answers. `bare` speaks with the same weights without their adapter, if they have one.

    Both raise `JaxtuneError` for a conversation that cannot be put to the model.
    """

    label: str
    say: Say
    bare: Say | None = None


def sampling(settings: Settings) -> Sampling:
    """Raises `ConfigError` for settings that cannot be."""
    from jaxtune.inference.sampling import Sampling

    if settings.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {settings.max_new_tokens}; expected at least 1.")
    drawn = settings._asdict()
    del drawn["max_new_tokens"]
    return Sampling(**drawn)


def voices(models: Mapping[str, Model], words: TextCodec) -> list[Voice]:
    """`models` by their labels, in the order in which they answer."""
    return [
        Voice(
            label,
            _say(model, words),
            None if model.lora is None else _say(model.without_adapters(), words),
        )
        for label, model in models.items()
    ]


def _say(model: Model, words: TextCodec) -> Say:
    def say(messages: Sequence[Message], settings: Settings) -> Generator[str, None, Ended]:
        from jaxtune.inference.generate import stream

        most = settings.max_new_tokens
        found = yield from stream(
            model, words, messages, max_new_tokens=most, sampling=sampling(settings)
        )
        return Ended(found.stopped, full=not found.stopped and found.tokens < most)

    return say
