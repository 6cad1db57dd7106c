"""Chips and slices: what they can do and their names; published figures, nothing measured, no JAX.

Names are those people rent by: `v5e-16`, `v5litepod-16`, `v6e-8`, `v5p-128`, `v4-8`, `tpu7x-8`, or
a shape, `v5e:4x4`; several slices as `2 x v5e-256`. A v4, v5p or tpu7x name counts TensorCores, two
to a chip; a v5e or v6e name counts chips. `h100-8` is eight GPUs of one machine, `cpu` this one.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from jaxtune.config import ConfigError, nearest


class Chip(NamedTuple):
    """A chip. `flops`: dense bf16 a second; `hbm`: bytes a program may use; `hbm_rate` and
    `link_rate` (all links of a chip, one way): bytes a second; `kinds`: what JAX calls its device.
    `clock`: cycles a second, of those the TPU compiler counts.
    """

    flops: float
    hbm: int
    hbm_rate: float
    link_rate: float
    kinds: tuple[str, ...]
    cores_in_name: int = 1  # what a name counts, for each chip
    devices: int = 1  # that JAX shows for each chip (a v4 shows its two cores as one)
    dimensions: int = 2  # of the torus
    clock: float = 0.0
    hosts_of: int = 4  # chips that share a host
    largest: int = 256  # chips of a slice
    mode: str = ""  # the TPU compiler's name for these devices, where its default has others


_GIB = 2**30

# Sources: cloud.google.com/tpu/docs (system architecture pages; `hbm` is what the TPU compiler
# accepts, libtpu 0.0.51), NVIDIA data sheets (dense, without sparsity). `clock` is the peak divided
# by the FLOPs a cycle of the matrix units.
# fmt: off
CHIPS: Mapping[str, Chip] = {
    "v4": Chip(
        275e12, int(30.75 * _GIB), 1228e9, 300e9, ("TPU v4",), 2, 1, 3, 1.05e9,
        largest=4096, mode="megacore",
    ),
    "v5e": Chip(197e12, int(15.75 * _GIB), 819e9, 180e9, ("TPU v5 lite", "TPU v5e"), clock=1.503e9),
    "v5p": Chip(
        459e12, int(95.73 * _GIB), 2765e9, 540e9, ("TPU v5", "TPU v5p"), 2, 1, 3, 1.751e9,
        largest=8960,
    ),
    "v6e": Chip(
        918e12, int(31.24 * _GIB), 1640e9, 360e9, ("TPU v6 lite", "TPU v6e"), clock=1.751e9
    ),
    "tpu7x": Chip(
        2307e12, int(189.48 * _GIB), 7380e9, 600e9, ("TPU7x",), 2, 2, 3, 2.2e9,
        largest=9216,
    ),
    "a100-40": Chip(312e12, 39 * _GIB, 1555e9, 300e9, ("NVIDIA A100-SXM4-40GB",), hosts_of=8),
    "a100-80": Chip(312e12, 79 * _GIB, 2039e9, 300e9, ("NVIDIA A100-SXM4-80GB",), hosts_of=8),
    "h100": Chip(989e12, 79 * _GIB, 3350e9, 450e9, ("NVIDIA H100 80GB HBM3",), hosts_of=8),
    "h200": Chip(989e12, 140 * _GIB, 4800e9, 450e9, ("NVIDIA H200",), hosts_of=8),
}
# fmt: on
# The machine at hand, whose memory is read when it is needed.
CPU = Chip(0.0, 0, 0.0, 0.0, ("cpu",))
HOST_RATE = 16e9  # bytes a second between a chip and its host's memory; an assumption, PCIe 3 x16
DCN_RATE = 6.25e9  # bytes a second that a chip sends to other slices; an assumption, 50 Gbit/s

# What the TPU compiler is told, by `plan` and by `train` alike: name -> value.
TPU_FLAGS: Mapping[str, str] = {
    # No matrix product is split to hide its own collective: slower in every case tried.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}
_OTHER_NAMES = {"v5litepod": "v5e", "v5lite": "v5e", "v5": "v5p", "v7x": "tpu7x", "7x": "tpu7x"}

# Shapes the compiler accepts, by chips.
_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16),
         256: (16, 16)}  # fmt: skip
_CUBE = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8),
         256: (4, 8, 8), 512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16),
         4096: (16, 16, 16)}  # fmt: skip


_MOST_CHIPS = 2**17  # of all slices together: no plan is made for more
_NUMBER = "[0-9]{1,9}"

_TPUS = tuple(kind for kind, chip in CHIPS.items() if chip.clock)
_GPUS = tuple(kind for kind in CHIPS if kind not in _TPUS)


class Slice(NamedTuple):
    """A number of `slices` of `shape` in chips, joined by the data-centre network."""

    kind: str  # a key of CHIPS
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CPU if self.kind == "cpu" else CHIPS[self.kind]

    @property
    def platform(self) -> str:
        """Name the platform as JAX does: tpu, gpu or cpu."""
        return "cpu" if self.kind == "cpu" else "tpu" if self.kind in _TPUS else "gpu"

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def name(self) -> str:
        """As people rent it: v5e-16, 2xv5e-256."""
        if self.kind == "cpu":
            return "cpu"
        size = math.prod(self.shape) * self.chip.cores_in_name
        shapes = _CUBE if self.chip.dimensions == 3 else _FLAT
        known = self.platform == "gpu" or shapes.get(math.prod(self.shape)) == self.shape
        one = f"{self.kind}-{size}" if known else self.topology
        return one if self.slices == 1 else f"{self.slices}x{one}"

    @property
    def topology(self) -> str:
        """Return the compiler's name for a slice: `v5e:4x4`."""
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"


def parse_slice(name: str) -> Slice:
    """Parse a slice's name. Raises `ConfigError` with what there is.

    >>> parse_slice("v5p-16").topology
    'v5p:2x2x2'
    """
    one = name.strip().lower().replace(" ", "")
    slices = 1
    if count := re.match(rf"({_NUMBER})(\*|x(?=[a-z]))", one):  # 2 x v5e-256
        slices, one = int(count[1]), one[count.end() :]
    if one == "cpu":
        return Slice("cpu", (1,))
    machine = "h100" if one == "gpu" else one
    if gpus := re.fullmatch(rf"({'|'.join(_GPUS)})(?:-({_NUMBER}))?", machine):
        return _machine(name, gpus[1], int(gpus[2] or 1), slices)
    kind, _, size = one.partition(":") if ":" in one else one.rpartition("-")
    kind = _OTHER_NAMES.get(kind, kind)
    if kind not in _TPUS or slices < 1:
        raise ConfigError(
            f"topology: '{name}' is not known.{nearest(kind, [*_TPUS, *_GPUS])} Write v5e-16, "
            "v5p-8, v6e-8, v4-8, tpu7x-8, a shape such as v5e:4x4, several slices as 2xv5e-256, "
            "h100-8 for GPUs, or cpu."
        )
    chip = CHIPS[kind]
    shapes = _CUBE if chip.dimensions == 3 else _FLAT
    if ":" in one:
        numbers = re.fullmatch(rf"{_NUMBER}(x{_NUMBER})*", size)
        shape = tuple(int(n) for n in size.split("x")) if numbers else ()
        if len(shape) != chip.dimensions or 0 in shape:
            example = "x".join(map(str, shapes[8]))
            raise ConfigError(f"topology: '{name}': a {kind} slice is written as {kind}:{example}.")
        return _checked(Slice(kind, shape, slices), name)
    chips = int(size) / chip.cores_in_name if re.fullmatch(_NUMBER, size) else 0
    if chips not in shapes:
        sizes = ", ".join(f"{kind}-{chips * chip.cores_in_name}" for chips in shapes)
        raise ConfigError(f"topology: there is no '{name}'. There are: {sizes}.")
    return _checked(Slice(kind, shapes[int(chips)], slices), name)


def _checked(slice: Slice, name: str) -> Slice:
    one, largest = math.prod(slice.shape), slice.chip.largest
    if one > largest:
        raise ConfigError(
            f"topology: '{name}': {one:,} chips; the largest slice of {slice.kind} has "
            f"{largest:,}. Join several as 2x{slice.kind}-N."
        )
    if slice.chips > _MOST_CHIPS:
        raise ConfigError(
            f"topology: '{name}': {slice.chips:,} chips; plans are made for up to "
            f"{_MOST_CHIPS:,}. Choose fewer slices."
        )
    return slice


def _machine(name: str, kind: str, count: int, machines: int) -> Slice:
    if not 1 <= count <= CHIPS[kind].hosts_of or machines != 1:
        raise ConfigError(
            f"topology: '{name}': GPUs are planned for one machine of 1 to {CHIPS[kind].hosts_of}."
        )
    return Slice(kind, (count,))


def larger(slice: Slice) -> Slice | None:
    """Return a slice of the next size, or None at the largest."""
    chip = slice.chip
    if slice.platform == "gpu":
        count = 2 * slice.chips
        return Slice(slice.kind, (count,)) if count <= chip.hosts_of else None
    if slice.platform == "cpu" or slice.slices > 1:
        return None
    shapes = _CUBE if chip.dimensions == 3 else _FLAT
    more = [count for count in shapes if count > slice.chips]
    return Slice(slice.kind, shapes[min(more)]) if more else None


def set_compiler_flags() -> None:
    """Add `TPU_FLAGS` to LIBTPU_INIT_ARGS, but for those that it sets already.

    JAX reads it when it first looks for devices: call this before. Harmless without a TPU.
    """
    flags = os.environ.get("LIBTPU_INIT_ARGS", "").split()
    known = {flag.lstrip("-").partition("=")[0] for flag in flags}
    flags += [f"--{name}={value}" for name, value in TPU_FLAGS.items() if name not in known]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(flags)


def peak_flops(device_kind: str) -> float | None:
    """Return dense bf16 FLOPs a second of a JAX device of that kind, or None."""
    for chip in CHIPS.values():
        if device_kind in chip.kinds:
            return chip.flops / chip.devices
    return None
