"""The time of a step: a compute, a memory and a network term, and the assumptions behind each.

Never XLA's `optimal_seconds`, which counts loops once and knows no network. Of a compiled step the
compute term is the compiler's own schedule (cycles of every fusion, those bound by memory
included) plus attention kernels, of which it knows nothing, at half of the peak; collectives that
nothing is scheduled beside are added, and no step is shorter than all it sends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from jaxtune.parallel.chips import DCN_RATE, HOST_RATE, Slice
from jaxtune.planning import memory_model
from jaxtune.planning.compile import CompiledStep
from jaxtune.planning.memory_model import Work

KERNEL_SHARE = 0.5  # of the peak that kernels reach: attention, and experts' grouped products
ADAPTER_SHARE = 0.3  # of the memory's rate that the products of adapters reach
SAVED_SHARE = 0.5  # and what is written for the backward pass and read there
EXCHANGE_PASSES = 14  # over activations, for each sum over `tensor`: nothing is fused across it
STATE_PASSES = 3.5  # as long as state takes to be read and written once: norms, update, casts
MIXTURE_PASSES = 62  # over a token's copy for each of its experts: sorted, and summed in f32
FORWARD_SHARE = 0.25  # of such vector work, in layers that the backward pass does not reach
NEARLY_FULL = 0.92  # of the memory
LANES = 128  # numbers of a vector register's row; a head of 64 fills half of it


class Speed(NamedTuple):
    """A TPU generation's speeds in the compiler's schedules."""

    products: float  # share of the peak, of layers' products and of a head's that is streamed
    whole_head: float  # the same of a head at once, whose gradient passes through memory each time
    heads: float  # nanoseconds of vector units for a number of queries, keys or values, of a chip
    partials: float  # and for a number of the attention kernel's partial sums
    hides: bool  # whether gathers are hidden behind products


# Read from schedules of whole steps (libtpu 0.0.50.1, jax 0.12.0.1); docs/plan.md has them.
SPEEDS: Mapping[str, Speed] = {
    "v5e": Speed(0.84, 0.60, 0.167, 0.0187, True),
    "v6e": Speed(0.57, 0.35, 0.0855, 0.0181, False),
    "v5p": Speed(0.81, 0.50, 0.065, 0.0091, False),
}
UNKNOWN = Speed(0.75, 0.60, 0.0, 0.0, True)


class Time(NamedTuple):
    """Seconds of one step. `step` is the estimate, the rest what it is made of."""

    step: float
    compute: float  # matrix products, elementwise work, and what of the memory bounds them
    attention: float
    exposed: float  # collectives that nothing hides
    network: float  # all collectives, hidden ones too
    other_slices: float  # through the data-centre network
    memory: float  # the least the memory needs: state read and written once
    host: float = 0.0  # to the host's memory and back


def of_compiled(read: CompiledStep, slice: Slice, per_chip: int) -> Time:
    """From a compiled program's figures, which are of one device."""
    chip = slice.chip
    compute = read.cost.cycles / chip.clock
    attention = read.cost.kernel_flops / (KERNEL_SHARE * chip.flops / per_chip)
    link = chip.link_rate / per_chip
    exposed, network = read.cost.exposed_bytes / link, read.cost.wire_bytes / link
    far = other_slices(read.cost.axes, slice, per_chip)
    memory = 2 * read.arguments / (chip.hbm_rate / per_chip)
    host = 2 * read.host / (HOST_RATE / per_chip)  # nothing is assumed to hide it
    step = max(compute + attention + exposed, network, memory) + far + host
    return Time(step, compute, attention, exposed, network, far, memory, host)


def of_estimate(work: Work, held: Mapping[str, int], slice: Slice, per_chip: int) -> Time:
    """By arithmetic alone, from `SPEEDS`."""
    chip, speed = slice.chip, SPEEDS.get(slice.kind, UNKNOWN)
    peak, rate = chip.flops / per_chip, chip.hbm_rate / per_chip
    state = 2 * (held["parameters"] + held["optimiser"]) / rate
    link, sent = chip.link_rate / per_chip, memory_model.sent_bytes(work)
    saved = 2 * memory_model.activations(work) * work.microbatches
    away = 2 * (memory_model.offloaded(work) * work.microbatches + held["host"])
    summed = EXCHANGE_PASSES * sent.exchanged / 2  # a sum is sent twice
    compute = (
        products(work, speed) / peak
        + vectors(work, speed) * per_chip
        + (saved / SAVED_SHARE + summed + adapters(work) / ADAPTER_SHARE + routing(work)) / rate
        + STATE_PASSES * state
    )
    attention = memory_model.attention_flops(work) / (KERNEL_SHARE * peak)
    # Gradients, and what a layer exchanges over `expert`, `tensor` or `context`, are waited for
    # everywhere.
    waited = sent.exchanged + sent.travelled + sent.rows
    waited += sent.scattered + sent.everywhere + sent.head
    # What is hidden lies in memory meanwhile: where that is nearly full, nothing is.
    full = sum(memory_model.memory(work, held).values()) > NEARLY_FULL * chip.hbm / per_chip
    waited = waited if speed.hides and not full else sum(sent)
    network = sum(sent) / link
    exposed = max(waited / link, network - compute - attention)
    far = other_slices(memory_model.wire(work), slice, per_chip)
    host = away / (HOST_RATE / per_chip)
    step = compute + attention + exposed + far + host
    return Time(step, compute, attention, exposed, network, far, state, host)


def products(work: Work, speed: Speed) -> float:
    """FLOPs of matrix products as if all ran at the peak."""
    flops, at_once = memory_model.flops(work), memory_model.loss_plan(work).whole_kernel
    head = speed.whole_head if at_once else speed.products
    return flops.layers / speed.products + flops.experts / KERNEL_SHARE + flops.head / head


def vectors(work: Work, speed: Speed) -> float:
    """Seconds of one device's vector units: norms, rope and the layouts around the attention
    kernel, by the numbers of heads, which fill whole lanes; and the kernel's partial sums."""
    each = 0.0
    for i, stack in enumerate(work.spec.stacks):
        reached = work.backward.reaches(i)
        for layer in stack.pattern:
            lanes = -(-layer.head_dim // LANES) * LANES / work.sizes["tensor"]
            heads = layer.heads + layer.kv_heads * work.sizes["context"]
            nanoseconds = speed.heads * heads * lanes * (1 if reached else FORWARD_SHARE)
            if reached:
                nanoseconds += (
                    speed.partials * memory_model.partial_sums(work, layer) * layer.heads * lanes
                )
            each += stack.repeats * nanoseconds
    tokens = work.tokens_per_step / work.devices
    return 1e-9 * tokens * each


def routing(work: Work) -> float:
    """Bytes that pass while tokens go to their experts and back; where they travel, also the sums
    in f32 of the experts' gradients, which every round adds to."""
    chosen = sum(
        stack.repeats * layer.moe.per_token * (1 if work.backward.reaches(i) else FORWARD_SHARE)
        for i, stack in enumerate(work.spec.stacks)
        for layer in stack.pattern
        if layer.moe is not None
    )
    tokens = work.tokens_per_step / work.devices
    passing = MIXTURE_PASSES * chosen * tokens * work.item * work.spec.width
    if work.lora or (peers := work.sizes["expert"]) == 1:
        return passing
    cut = peers * work.sizes["tensor"]
    for layer in work.spec.layers:
        if layer.moe is not None:
            copies, rows = memory_model.a_round(work, layer.moe)
            rounds = math.ceil(copies / rows)
            each = rounds * (8 + work.item) + 8 + work.item  # and zeros before, the cast behind
            passing += each * memory_model.travelling(work, layer) / cut * work.microbatches
    return passing


def adapters(work: Work) -> float:
    """Bytes that the products of adapters read and write, forward, again and twice backward: with
    a rank this small they are bound by memory."""
    if not work.lora:
        return 0.0
    widths = 0.0
    for layer in work.spec.layers:
        q, kv = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        wide = 0 if layer.moe is not None else (3 if layer.gated else 2)
        attention = 4 * work.spec.width + 2 * (q + kv)
        widths += attention + wide * (work.spec.width + layer.mlp_width)
    passes = 4 if memory_model.recomputes(work) else 3
    tokens = work.tokens_per_step / work.devices
    return passes * work.item * tokens * widths / work.sizes["tensor"]


def other_slices(axes: Mapping[str, float], slice: Slice, per_chip: int) -> float:
    """Return the seconds of traffic between slices, along `data`; nothing hides it."""
    if slice.slices == 1:
        return 0.0
    across = sum(sent for along, sent in axes.items() if "data" in along.split("+"))
    return across / (DCN_RATE / per_chip)
