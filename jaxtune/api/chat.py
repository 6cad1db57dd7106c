"""The work of `chat`: answers to prompts, a conversation in the terminal, a server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtune.config import Config
from jaxtune.inference.generate import Generation, generate, prompt_ids
from jaxtune.inference.load import (
    Model,
    TextCodec,
    check_base,
    load_model,
    open_codec,
    open_mesh,
    resolved,
)
from jaxtune.inference.prompts import Prompt, read_prompts, text_prompt
from jaxtune.parallel import memory
from jaxtune.repl.models import ChatSettings, chat_models, sampling_of
from jaxtune.repl.repl import run_conversation
from jaxtune.server.bound_socket import BoundSocket, bind_socket

__all__ = ["BoundSocket", "ChatSettings", "Prompt", "bind_socket", "read_prompts", "text_prompt"]


class ChatResult(NamedTuple):
    """The rows that `--prompts` and `--prompt` give; empty after a conversation."""

    answers: list[Mapping[str, Any]]


class ServeSettings(NamedTuple):
    """The limits of a server; without `seeded` each request that samples gets its own seed."""

    slots: int
    queue: int
    seconds: float
    length: int | None = None
    seeded: bool = False


def answer_prompts(
    config: Config, prompts: Sequence[Prompt], settings: ChatSettings, *, base: str | None = None
) -> ChatResult:
    """Answer every prompt, in order; the answer of `base` stands under "base".

    Raises: ConfigError, DataError, ModelError.
    """
    # Merged adapters answer faster; a conversation can turn them off and on instead.
    with _loaded(config, settings, base, merge=True) as (models, codec):
        generations = {
            label: generate(
                model,
                codec,
                [prompt_ids(model, codec, prompt.conversation) for prompt in prompts],
                max_new_tokens=settings.max_new_tokens,
                sampling=sampling_of(settings),
            )
            for label, model in models.items()
        }
    *beside, answers = generations.values()
    rows: list[Mapping[str, Any]] = []
    for i, prompt in enumerate(prompts):
        more = {"base": _row(beside[0][i])} if beside else {}
        rows.append({"prompt": prompt.source, **_row(answers[i]), **more})
    return ChatResult(rows)


def converse(
    config: Config, settings: ChatSettings, *, base: str | None, history: str | None
) -> ChatResult:
    """Hold a conversation in the terminal. Raises: ConfigError, DataError, ModelError."""
    with _loaded(config, settings, base) as (models, codec):
        run_conversation(chat_models(models, codec), settings, history=history)
    return ChatResult([])


def serve(
    config: Config,
    settings: ChatSettings,
    limits: ServeSettings,
    bound: BoundSocket,
    *,
    base: str | None,
) -> ChatResult:
    """Serve over HTTP until a signal. Raises: ConfigError, DataError, ModelError."""
    # Here, as all of the server but its socket needs the optional starlette and uvicorn.
    from jaxtune.server.start import Defaults, Limits, start

    with bound.socket, _loaded(config, settings, base) as (models, codec):
        defaults = Defaults(sampling_of(settings), settings.max_new_tokens, limits.seeded)
        slots = Limits(slots=limits.slots, queue=limits.queue, seconds=limits.seconds)
        start(models, codec, defaults, slots, bound, length=limits.length)
    return ChatResult([])


@contextlib.contextmanager
def _loaded(
    config: Config, settings: ChatSettings, base: str | None, *, merge: bool = False
) -> Iterator[tuple[dict[str, Model], TextCodec]]:
    """Load the models by label; a want of memory within is explained."""
    smaller = (
        f"Set dtype bfloat16, a smaller --max_new_tokens (now {settings.max_new_tokens}), or "
        f"more devices along mesh.fsdp (now {config.mesh.fsdp}; -1 is all there are)."
    )
    with memory.explained(smaller):
        config = resolved(config)
        codec, mesh = open_codec(config), open_mesh(config)
        assert config.model_name_or_path is not None
        names = {"tuned" if base else "model": config.model_name_or_path}
        if base is not None:
            check_base(base, codec)
            names = {"base": base, **names}
        yield (
            {
                label: load_model(name, config, codec, mesh, merge=merge)
                for label, name in names.items()
            },
            codec,
        )


def _row(answer: Generation) -> dict[str, Any]:
    return {"response": answer.text, "stopped": answer.stopped, "tokens": answer.tokens}
