"""The devices a plan is for: those of the TPU compiler's topology, or stand-ins for placement.

A stand-in has what `mesh` asks of a device and nothing that could run. With stand-ins a program is
built and its shapes and shardings are read; only a topology's devices can be compiled for.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtune.config import ConfigError
from jaxtune.parallel import memory
from jaxtune.parallel.chips import Slice


@dataclass(frozen=True)
class StandIn:
    """A device by name only."""

    id: int
    platform: str
    device_kind: str
    process_index: int
    slice_index: int
    coords: tuple[int, ...]
    core_on_chip: int


class Hardware(NamedTuple):
    """`devices` are all of `slice`, `per_chip` of them on each chip; `limit` in bytes of each
    device, None where it is not known; `hosts` share the chips."""

    slice: Slice
    devices: Sequence[Any]
    per_chip: int
    limit: int | None
    hosts: int
    compiles: bool


def make_hardware(slice: Slice, *, compiles: bool) -> Hardware:
    """The devices of `slice`. Raises `ConfigError` where they cannot be had."""
    if slice.platform == "tpu" and compiles:
        devices: Sequence[Any] = _topology(slice)
    else:
        devices = _stand_ins(slice)
    per_chip = max(1, len(devices) // slice.chips)
    limit = memory.machine_bytes() if slice.platform == "cpu" else slice.chip.hbm // per_chip
    hosts = len({device.process_index for device in devices})
    return Hardware(slice, devices, per_chip, limit, hosts, slice.platform == "tpu" and compiles)


def _topology(slice: Slice) -> Sequence[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"topology: {slice.topology} is compiled for by the TPU compiler, which is not "
            "installed here. pip install 'jaxtune[tpu]' brings it, no TPU needed; or plan by "
            "arithmetic alone with --compile false."
        )
    from jax.experimental import topologies

    more: dict[str, Any] = {"num_slices": slice.slices} if slice.slices > 1 else {}
    if slice.chip.mode:
        more["chip_config_name"] = slice.chip.mode
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=slice.topology, **more
        )
    except Exception as error:  # what the compiler raises has no type of its own
        message = " ".join(str(error).split())[:200]
        raise ConfigError(f"topology: the compiler knows no {slice.topology}: {message}") from None
    return list(described.devices)


def _stand_ins(slice: Slice) -> Sequence[StandIn]:
    chip, count = slice.chip, math.prod(slice.shape)
    sizes = (*slice.shape, 1, 1)[:3]
    places = [place[::-1] for place in itertools.product(*(range(n) for n in sizes[::-1]))]
    return [
        StandIn(
            id=number,
            platform=slice.platform,
            device_kind=chip.kinds[0],
            process_index=number // (chip.hosts_of * chip.devices),
            slice_index=number // (count * chip.devices),
            coords=places[number // chip.devices % count],
            core_on_chip=number % chip.devices,
        )
        for number in range(slice.chips * chip.devices)
    ]
