"""The longest sequence for which every slot has memory.

A model may have more positions than the machine has memory for: the KV cache of a sequence grows
with its length, and all slots of a model are as long as the longest one needs.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import jax

from jaxtune.cli import note
from jaxtune.config import ConfigError
from jaxtune.inference.load import GenerationModel
from jaxtune.model.decoder import empty_cache
from jaxtune.parallel import memory
from jaxtune.parallel.mesh import row_shards

# Of the free memory: growing slots stand beside their former selves, and a prefill comes on top.
_SHARE = 1 / 3
_STEP = 1024  # positions


def longest_text(models: Sequence[GenerationModel], slots: int, requested: int | None) -> int:
    """Return the most tokens of prompt and answer: `requested`, or what fits.

    That is as many as the models have positions and free memory holds in all slots of all models.
    Raises: ConfigError.
    """
    positions = max(model.spec.max_positions for model in models)
    if requested is not None:
        if requested > positions:
            raise ConfigError(
                f"serve_length is {requested}; the model has {positions} positions. Give no more."
            )
        return requested
    most = min(_free_bytes(model) for model in models) * _SHARE
    steps = range(1, -(-positions // _STEP) + 1)
    fitting = bisect.bisect_right(
        steps,
        most,
        key=lambda step: sum(_cache_bytes(model, slots, step * _STEP) for model in models),
    )
    length = min(positions, max(1, fitting) * _STEP)
    if length < positions:
        note(
            f"prompt and answer: at most {length} tokens of the model's {positions}, for which "
            f"{slots} slots have room; --serve_length and --serve_slots set both"
        )
    return length


def _cache_bytes(model: GenerationModel, slots: int, length: int) -> float:
    """Return the bytes on one device of a full cache, as if no device shared its heads."""
    cache = jax.eval_shape(
        lambda: empty_cache(
            model.spec,
            rows=slots,
            length=min(length, model.spec.max_positions),
            dtype=model.dtype,
        )
    )
    whole: int = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    return whole / row_shards(model.mesh)


def _free_bytes(model: GenerationModel) -> float:
    """Return the free bytes of the fullest device; of the machine if devices are its cores."""
    devices = model.mesh.local_devices
    stats = [device.memory_stats() or {} for device in devices]
    if all("bytes_limit" in each for each in stats):
        free: int = min(each["bytes_limit"] - each["bytes_in_use"] for each in stats)
        return free
    return (memory.available_bytes() or memory.machine_bytes()) / len(devices)
