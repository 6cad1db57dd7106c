"""Many prompts through an `Engine`, in order."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
from jax.typing import DTypeLike

from jaxtune.inference.decode_step import MOST_STEPS
from jaxtune.inference.engine import Engine, by_length
from jaxtune.inference.sampling import GREEDY, Sampling
from jaxtune.model.decoder import Params
from jaxtune.spec import ModelSpec


class Decoded(NamedTuple):
    """The tokens after a prompt; `stopped` says a stop id came."""

    tokens: list[int]
    stopped: bool


def decode_all(
    spec: ModelSpec,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    dtype: DTypeLike,
    mesh: jax.sharding.Mesh | None = None,
    batch_size: int = 32,
    sampling: Sampling = GREEDY,
    most: int = MOST_STEPS,
) -> list[Decoded]:
    """Prompt i is number i of `sampling`'s seed; at most `most` tokens of a row come at once."""
    slots = max(1, min(batch_size, len(prompts)))
    engine = Engine(spec, {"params": params}, dtype=dtype, slots=slots, mesh=mesh)
    numbers = {
        engine.submit(
            prompts[i],
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            sampling=sampling,
            number=i,
        ): i
        for i in by_length(prompts)
    }
    decoded = [Decoded([], False) for _ in prompts]
    while engine.busy:
        for event in engine.step(most):
            assert len(event.tokens) <= most
            i = numbers[event.request]
            decoded[i] = Decoded([*decoded[i].tokens, *event.tokens], event.reason == "stop")
    return decoded
