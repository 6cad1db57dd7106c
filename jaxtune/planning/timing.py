"""How long a step takes: a compute, a memory and a network term, and the assumptions behind each.

Never XLA's `optimal_seconds`, which counts loops once and knows no network. Of a compiled step the
compute term is the compiler's own schedule (cycles of every fusion, those bound by memory
included) plus attention kernels, of which it knows nothing, at half of the peak; collectives that
nothing is scheduled beside are added, and no step is shorter than all it sends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from jaxtune.chips import DCN_RATE, Slice
from jaxtune.planning.compiling import Read
from jaxtune.planning.estimate import KERNEL_SHARE, share


class Time(NamedTuple):
    """Seconds of one step. `step` is the estimate, the rest what it is made of."""

    step: float
    compute: float  # matrix products, elementwise work, and what of the memory bounds them
    attention: float
    exposed: float  # collectives that nothing hides
    network: float  # all collectives, hidden ones too
    other_slices: float  # through the data-centre network
    memory: float  # the least the memory needs: state read and written once


def of_compiled(read: Read, slice: Slice, per_chip: int) -> Time:
    """From a compiled program's figures, which are of one device."""
    chip = slice.chip
    compute = read.cycles / chip.clock
    attention = read.kernel_flops / (KERNEL_SHARE * chip.flops / per_chip)
    link = chip.link_rate / per_chip
    exposed, network = read.exposed_bytes / link, read.wire_bytes / link
    far = other_slices(read.axes, slice, per_chip)
    memory = 2 * read.arguments / (chip.hbm_rate / per_chip)
    step = max(compute + attention + exposed, network, memory) + far
    return Time(step, compute, attention, exposed, network, far, memory)


def of_estimate(
    flops: tuple[float, float],
    wire: Mapping[str, float],
    state: float,
    slice: Slice,
    per_chip: int,
) -> Time:
    """By arithmetic alone: matrix products at `share` of the peak, attention at half of it,
    collectives hidden as far as there is something to hide them behind, but for those over
    `tensor`."""
    chip = slice.chip
    peak = chip.flops / per_chip
    compute, attention = flops[0] / (share(slice.kind) * peak), flops[1] / (KERNEL_SHARE * peak)
    link = chip.link_rate / per_chip
    network = sum(wire.values()) / link
    memory = 2 * state / (chip.hbm_rate / per_chip)
    # What a layer exchanges over `tensor` it also waits for.
    waited = wire.get("tensor", 0.0) / link
    exposed = max(waited, network - compute - attention)
    far = other_slices(wire, slice, per_chip)
    step = compute + attention + exposed + memory + far
    return Time(step, compute, attention, exposed, network, far, memory)


def other_slices(axes: Mapping[str, float], slice: Slice, per_chip: int) -> float:
    """What crosses slices runs along `data`; nothing is assumed to hide it."""
    if slice.slices == 1:
        return 0.0
    across = sum(sent for along, sent in axes.items() if "data" in along.split("+"))
    return across / (DCN_RATE / per_chip)
