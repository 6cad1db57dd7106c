"""Loaded models -> a running server."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtune.inference.generate import TextGenerator
from jaxtune.inference.kv_capacity import longest_text
from jaxtune.server.app import Defaults, Served, application
from jaxtune.server.auth import Door
from jaxtune.server.prompts import chat_ids, text_ids
from jaxtune.server.run import Taken, serve
from jaxtune.server.scheduler import Desk, Limits

if TYPE_CHECKING:
    from jaxtune.inference.load import Model, TextCodec


def start(
    models: Mapping[str, Model],
    words: TextCodec,
    defaults: Defaults,
    limits: Limits,
    taken: Taken,
    *,
    length: int | None = None,
) -> None:
    """Until a signal. A model alone whose adapter is not merged is served beside its base.
    `length`: the longest text, prompt and answer; None is what there is room for. Raises
    `ConfigError` where no model has so many positions."""
    names = list(models)
    title = "/".join(Path(models[names[-1]].name).parts[-2:])
    if len(models) == 1 and models[names[0]].lora is not None:
        models = {"base": models[names[0]].without_adapters(), "adapter": models[names[0]]}
    longest = longest_text(list(models.values()), limits.slots, length)
    served = [
        Served(
            name,
            min(longest, model.spec.max_positions),
            partial(chat_ids, model, words),
            partial(text_ids, model, words),
            words.template,
        )
        for name, model in models.items()
    ]
    engines = {
        name: TextGenerator(model, words, slots=limits.slots, max_length=longest)
        for name, model in models.items()
    }
    desk = Desk(engines, limits)
    door = Door(taken.address.loopback, taken.key)
    serve(application(served, desk, defaults, door, title), desk, taken, ", ".join(models))
