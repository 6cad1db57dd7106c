"""Frozen kernels in 4 or 8 bits, made smaller while loading and larger again where they are used.

`nf4` (Dettmers et al., arXiv:2305.14314): each value is one of 16, the quantiles of a normal
distribution, times the largest magnitude in its block of 64 weights of one output. With `double`
these magnitudes are 8-bit numbers themselves, in blocks of 256 around their mean. `int8`: each
value is one of 255 equal steps of the largest magnitude of its output.

A quantised kernel stands in the parameters as a dict of leaves; `codes` has the kernel's own shape
and axes, so it is spread over devices as the kernel would be. Kernels of experts, side by side in
one array, are quantised one by one.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

KINDS = ("none", "int8", "nf4")
BLOCK = 64  # weights of one output that share a scale
SCALES_BLOCK = 256  # scales that share a scale of their own

# The 16 values of the paper's appendix E, ascending.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip

Stored = Mapping[str, Any]  # name of a leaf -> array


class Leaf(NamedTuple):
    """A leaf of a quantised kernel: `letters` of its dimensions, "." for one of its own.

    Blocks along the width of the model have its letter: their scales are spread over devices as
    the weights are, which would be half as much again of all weights on each device otherwise.
    """

    shape: tuple[int, ...]
    letters: str
    dtype: Any


def leaves(
    kind: str, letters: str, shared: str, sizes: Mapping[str, int], *, double: bool
) -> dict[str, Leaf]:
    """The leaves of a kernel of axes `letters`. Before those that are summed over, `shared`, stand
    axes of kernels side by side, behind them those of the outputs."""
    beside, _, added = letters.partition(shared)
    many = tuple(sizes[letter] for letter in beside)
    outputs = tuple(sizes[letter] for letter in added)
    codes = Leaf(tuple(sizes[letter] for letter in letters), letters, jnp.int8)
    if kind == "int8":
        return {"codes": codes, "scales": Leaf((*many, *outputs), beside + added, jnp.float32)}
    blocks = math.ceil(math.prod(sizes[letter] for letter in shared) / BLOCK)
    codes = codes._replace(dtype=jnp.uint4)
    along = shared if shared == "D" else "."
    scales = Leaf((*many, blocks, *outputs), f"{beside}{along}{added}", jnp.float32)
    if not double:
        return {"codes": codes, "scales": scales}
    count = math.ceil(blocks * math.prod(outputs) / SCALES_BLOCK)
    return {
        "codes": codes,
        "scales": scales._replace(dtype=jnp.int8),
        "outer_scales": Leaf((*many, count), f"{beside}.", jnp.float32),
        "outer_mean": Leaf(many, beside, jnp.float32),
    }


@functools.partial(jax.jit, static_argnames=("kind", "inputs", "double"))
def quantise(kernel: jax.Array, *, kind: str, inputs: int, double: bool) -> dict[str, jax.Array]:
    """Quantise one kernel, whose first `inputs` axes are summed over, into its leaves."""
    flat = kernel.astype(jnp.float32).reshape(-1, *kernel.shape[inputs:])  # [inputs outputs...]
    if kind == "int8":
        scales = jnp.max(jnp.abs(flat), axis=0) / 127
        codes = jnp.round(flat / jnp.where(scales == 0, 1.0, scales)[None])
        return {"codes": codes.astype(jnp.int8).reshape(kernel.shape), "scales": scales}
    blocked = _blocked(flat)
    scales = jnp.max(jnp.abs(blocked), axis=1)
    unit = blocked / jnp.where(scales == 0, 1.0, scales)[:, None]
    codes = jnp.zeros(unit.shape, jnp.int32)
    for low, high in itertools.pairwise(NF4):
        codes += unit > (low + high) / 2
    codes = codes.reshape(-1, *flat.shape[1:])[: len(flat)].astype(jnp.uint4)
    stored = {"codes": codes.reshape(kernel.shape), "scales": scales}
    if not double:
        return stored
    mean = jnp.mean(scales)
    around = _blocked(scales.reshape(-1) - mean, SCALES_BLOCK)
    outer = jnp.max(jnp.abs(around), axis=1) / 127
    small = jnp.round(around / jnp.where(outer == 0, 1.0, outer)[:, None]).astype(jnp.int8)
    small = small.reshape(-1)[: scales.size].reshape(scales.shape)
    return {**stored, "scales": small, "outer_scales": outer, "outer_mean": mean}


def dequantise(stored: Stored, *, kind: str, inputs: int, dtype: DTypeLike) -> jax.Array:
    """The one kernel again, in `dtype`; computed in float32."""
    codes, scales = stored["codes"], stored["scales"]
    flat_shape = (math.prod(codes.shape[:inputs]), *codes.shape[inputs:])
    if kind == "int8":
        flat: jax.Array = codes.reshape(flat_shape).astype(jnp.float32) * scales[None]
        return flat.astype(dtype).reshape(codes.shape)
    if "outer_scales" in stored:
        outer = jnp.repeat(stored["outer_scales"], SCALES_BLOCK)[: scales.size]
        scales = scales.astype(jnp.float32) * outer.reshape(scales.shape) + stored["outer_mean"]
    unit = jnp.asarray(NF4, jnp.float32)[codes.astype(jnp.int32)].reshape(flat_shape)
    each = jnp.repeat(scales, BLOCK, axis=0)[: flat_shape[0]]
    return (unit * each).astype(dtype).reshape(codes.shape)


def _blocked(values: jax.Array, size: int = BLOCK) -> jax.Array:
    """[n ...] -> [n/size size ...], the last block filled up with zeros."""
    missing = -len(values) % size
    padded = jnp.pad(values, ((0, missing), *((0, 0),) * (values.ndim - 1)))
    return padded.reshape(-1, size, *values.shape[1:])
