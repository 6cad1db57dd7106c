"""The work of `chat`: answers to prompts, a conversation in the terminal, a server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtune.api.chat_options import ChatOptions
from jaxtune.cli import note
from jaxtune.config import Config
from jaxtune.inference.generate import Generation, generate, prompt_ids
from jaxtune.inference.load import (
    GenerationModel,
    TextCodec,
    check_base,
    load_model,
    open_codec,
    open_mesh,
    resolved,
)
from jaxtune.inference.prompts import Prompt, read_prompts, text_prompt
from jaxtune.parallel import memory
from jaxtune.repl.models import ChatSettings, chat_models
from jaxtune.repl.repl import run_conversation
from jaxtune.server.bound_socket import bind_socket


class ChatResult(NamedTuple):
    """The rows that `--prompts` and `--prompt` give; empty after a conversation."""

    answers: list[Mapping[str, Any]]


def chat(config: Config, options: ChatOptions) -> ChatResult:
    """Answer prompts, hold a conversation, or serve until a signal.

    Raises: ConfigError, DataError, ModelError.
    """
    options.check()
    if options.serve is not None:
        return _serve(config, options, options.serve)
    if options.prompt is not None:
        return _answer(config, options, [text_prompt(options.prompt)])
    if options.prompts is not None:
        return _answer(config, options, list(read_prompts(options.prompts, config.roles)))
    with _loaded(config, options) as (models, codec):
        run_conversation(chat_models(models, codec), _settings(options), history=options.history)
    return ChatResult([])


def _answer(config: Config, options: ChatOptions, prompts: Sequence[Prompt]) -> ChatResult:
    """Answer every prompt, in order; the answer of the base stands under "base"."""
    # Merged adapters answer faster; a conversation can turn them off and on instead.
    conversations = [prompt.conversation for prompt in prompts]
    with _loaded(config, options, merge=True) as (models, codec):
        if unread := codec.template.unread(each.template_kwargs for each in conversations):
            note(codec.template.unread_text(unread, "prompt"))
        generations = {
            label: generate(
                model,
                codec,
                [prompt_ids(model, codec, conversation) for conversation in conversations],
                max_new_tokens=options.max_new_tokens,
                sampling=_settings(options),
                templates=[codec.template.for_conversation(each) for each in conversations],
            )
            for label, model in models.items()
        }
    *beside, answers = generations.values()
    rows: list[Mapping[str, Any]] = []
    for i, prompt in enumerate(prompts):
        more = {"base": _row(beside[0][i])} if beside else {}
        rows.append({"prompt": prompt.source, **_row(answers[i]), **more})
    return ChatResult(rows)


def _serve(config: Config, options: ChatOptions, address: str) -> ChatResult:
    bound = bind_socket(address)  # before any model is loaded
    # Here, as all of the server but its socket needs the optional starlette and uvicorn.
    from jaxtune.server.run import ServeSettings, start

    with bound.socket, _loaded(config, options) as (models, codec):
        settings = ServeSettings(
            _settings(options),
            options.max_new_tokens,
            seed_given="sample_seed" in options.model_fields_set,
            slots=options.serve_slots,
            queue=options.serve_queue,
            seconds=options.serve_seconds,
        )
        start(models, codec, settings, bound, length=options.serve_length)
    return ChatResult([])


def _settings(options: ChatOptions) -> ChatSettings:
    fields = options.model_dump(include={*ChatSettings.__dataclass_fields__})
    return ChatSettings(**fields, seed=options.sample_seed)


@contextlib.contextmanager
def _loaded(
    config: Config, options: ChatOptions, *, merge: bool = False
) -> Iterator[tuple[dict[str, GenerationModel], TextCodec]]:
    """Load the models by label; a want of memory within is explained."""
    smaller = (
        f"Set dtype bfloat16, a smaller --max_new_tokens (now {options.max_new_tokens}), or "
        f"more devices along mesh.fsdp (now {config.mesh.fsdp}; -1 is all there are)."
    )
    with memory.explained(smaller):
        config, base = resolved(config), options.base
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
