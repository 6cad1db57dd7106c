"""How long a text may become, so that every slot has room for one as long.

A model may have more positions than the machine has memory for. What is kept of a text while it is
answered grows with its length, and all slots of a model are as long as the longest needs.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxtune.cli import note
from jaxtune.config import ConfigError
from jaxtune.parallel import memory

if TYPE_CHECKING:
    from jaxtune.inference.load import Model

# Of the memory that is free: while slots grow, the former stand beside the new, and what reading a
# prompt takes comes on top.
_SHARE = 1 / 3
_STEP = 1024  # positions


def longest_text(models: Sequence[Model], slots: int, wanted: int | None) -> int:
    """Tokens of prompt and answer: `wanted`, else as many as the models have positions and the
    memory that is free holds in all slots of all models. Raises `ConfigError`."""
    positions = max(model.spec.max_positions for model in models)
    if wanted is not None:
        if wanted > positions:
            raise ConfigError(
                f"serve_length is {wanted}; the model has {positions} positions. Give no more."
            )
        return wanted
    most = min(_free_bytes(model) for model in models) * _SHARE
    steps = range(1, -(-positions // _STEP) + 1)
    fitting = bisect.bisect_right(
        steps,
        most,
        key=lambda step: sum(_kept_bytes(model, slots, step * _STEP) for model in models),
    )
    found = min(positions, max(1, fitting) * _STEP)
    if found < positions:
        note(
            f"prompt and answer: at most {found} tokens of the model's {positions}, for which "
            f"{slots} slots have room; --serve_length and --serve_slots set both"
        )
    return found


def _kept_bytes(model: Model, slots: int, length: int) -> float:
    """On one device, of texts that fill every slot; as if no device shared their heads."""
    import jax

    from jaxtune.model.decoder import empty_cache
    from jaxtune.parallel.mesh import row_shards

    kept = jax.eval_shape(
        lambda: empty_cache(
            model.spec,
            rows=slots,
            length=min(length, model.spec.max_positions),
            dtype=model.dtype,
        )
    )
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    return whole / row_shards(model.mesh)


def _free_bytes(model: Model) -> float:
    """Of the device of the mesh that has least; of this machine where devices are its cores."""
    devices = model.mesh.local_devices
    stats = [device.memory_stats() or {} for device in devices]
    if all("bytes_limit" in found for found in stats):
        return min(found["bytes_limit"] - found["bytes_in_use"] for found in stats)
    return (memory.available_bytes() or memory.machine_bytes()) / len(devices)
