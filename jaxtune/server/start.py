"""Loaded models -> a running server."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from jaxtune.inference.generate import TextGenerator
from jaxtune.inference.kv_capacity import longest_text
from jaxtune.inference.load import Model, TextCodec
from jaxtune.server.app import Defaults, ServedModel, application
from jaxtune.server.auth import AccessPolicy
from jaxtune.server.bound_socket import BoundSocket
from jaxtune.server.prompts import chat_ids, text_ids
from jaxtune.server.run import serve
from jaxtune.server.scheduler import Limits, Scheduler

__all__ = ["Defaults", "Limits", "start"]


def start(
    models: Mapping[str, Model],
    codec: TextCodec,
    defaults: Defaults,
    limits: Limits,
    bound: BoundSocket,
    *,
    length: int | None = None,
) -> None:
    """Serve until a signal. A model alone with an unmerged adapter is served beside its base.

    `length` is the most tokens of prompt and answer; None is what memory allows.
    Raises: ConfigError if no model has so many positions."""
    names = list(models)
    title = "/".join(Path(models[names[-1]].name).parts[-2:])
    if len(models) == 1 and models[names[0]].lora is not None:
        models = {"base": models[names[0]].without_adapters(), "adapter": models[names[0]]}
    longest = longest_text(list(models.values()), limits.slots, length)
    served = [
        ServedModel(
            name,
            min(longest, model.spec.max_positions),
            partial(chat_ids, model, codec),
            partial(text_ids, model, codec),
            codec.template,
        )
        for name, model in models.items()
    ]
    generators = {
        name: TextGenerator(model, codec, slots=limits.slots, max_length=longest)
        for name, model in models.items()
    }
    scheduler = Scheduler(generators, limits)
    policy = AccessPolicy(bound.address.loopback, bound.key)
    serve(
        application(served, scheduler, defaults, policy, title), scheduler, bound, ", ".join(models)
    )
