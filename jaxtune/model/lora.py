"""Low-rank adapters (Hu et al., arXiv:2106.09685) as einsum algebra: y = x W + scale * (x a) b.

    "BTD,DHK->BTHK"     W [D H K]     a [D R]       b [R H K]
    "BTHK,HKD->BTD"     W [H K D]     a [H K R]     b [R D]

`a` begins as PEFT's does (uniform within 1 / sqrt(inputs)), `b` as zeros: a new adapter changes
nothing. Both are f32, whatever the base is stored in. DoRA (Liu et al., arXiv:2402.09353) adds a
learned `magnitude` per output, which begins as the length of the weights of that output.

Tables of a row per token may have `rows` of their own for some tokens, trained beside a frozen
rest. All of it lies in the collection "lora"; without that collection the base is as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxtune.parallel import collectives

COLLECTION = "lora"


@dataclass(frozen=True)
class Lora:
    """A choice of the projections that have adapters, and of what kind; static, as the spec is.

    `targets` are names of projections, `stack_0/layer_0/attention/q`; None is all of them.
    `tokens` are ids whose rows of embedding and head are trained too. `dropout` is on the input of
    the adapter, while training. `base` is how the kernels of projections are stored, a name of
    `quantise.KINDS`, and `double_quant` whether nf4's scales are made smaller too.
    """

    r: int
    alpha: float
    targets: frozenset[str] | None = None
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    tokens: tuple[int, ...] = ()
    base: str = "none"
    double_quant: bool = False

    @property
    def scale(self) -> float:
        """Of what the adapter adds: alpha / r, or alpha / sqrt(r) (arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


Make = Callable[[jax.Array, tuple[int, ...]], jax.Array]  # (key, shape) -> f32
# Declares a leaf on a module, by name and letters, and gives its value ready for use.
Declare = Callable[[str, str, Make], jax.Array]


def has_adapter(module: nn.Module, lora: Lora | None, leaf: str = "a") -> bool:
    """Return True if `module` is adapted: has the leaf, or is a target while leaves are made."""
    if lora is None:
        return False
    if not module.is_mutable_collection(COLLECTION):
        return module.has_variable(COLLECTION, leaf)
    return leaf == "rows" or lora.targets is None or "/".join(module.path) in lora.targets


def adapt(
    module: nn.Module,
    lora: Lora,
    equation: str,
    x: jax.Array,
    y: jax.Array,
    *,
    kernel: Callable[[], jax.Array],
    product: Callable[[jax.Array], jax.Array],
    declare: Declare,
) -> jax.Array:
    """`y`, the base's product of `x`, with what the adapter of `module` adds.

    `product` is the base's, for another x; `kernel` its weights, which DoRA measures.
    """
    operands, output = equation.split("->")
    of_x, of_kernel = operands.split(",")
    shared = "".join(letter for letter in of_kernel if letter not in output)
    added = "".join(letter for letter in of_kernel if letter in output)
    rows = "".join(letter for letter in of_x if letter not in shared)

    def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        reach = 1 / math.sqrt(math.prod(shape[:-1]))
        return jax.random.uniform(key, shape, jnp.float32, -reach, reach)

    def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jnp.zeros(shape, jnp.float32)

    a, b = declare("a", f"{shared}R", uniform), declare("b", f"R{added}", zeros)
    dropped = x
    if lora.dropout and module.has_rng("dropout"):
        below = min(round(lora.dropout * 2**32), 2**32 - 1)  # the draws that leave a number out
        remains = collectives.bits(module.make_rng("dropout"), x.shape) >= jnp.uint32(below)
        dropped = jnp.where(remains, x / (1 - lora.dropout), jnp.zeros((), x.dtype))
    low = jnp.einsum(f"{of_x},{shared}R->{rows}R", dropped, a)
    delta = jnp.einsum(f"{rows}R,R{added}->{output}", low, b) * lora.scale
    if not lora.dora:
        return y + delta

    def length(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return lengths(of_kernel, shared, kernel(), a, b, lora.scale)

    magnitude = declare("magnitude", added, length)
    now = jax.lax.stop_gradient(lengths(of_kernel, shared, kernel(), a, b, lora.scale))
    ratio = (magnitude.astype(jnp.float32) / now).astype(y.dtype)
    ratio = jnp.broadcast_to(ratio, y.shape)
    # As PEFT computes it: what dropout leaves out of the adapter's input, it leaves out here too.
    plain = y if dropped is x else product(dropped)
    return y + (ratio - 1) * plain + ratio * delta


def lengths(
    letters: str, shared: str, kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float
) -> jax.Array:
    """The 2-norm of each output's weights with the adapter in them, f32, over `shared`.

    |w + s a b|^2 = |w|^2 + 2 s (w a) b + s^2 b (a a) b: the whole a b is never made.
    """
    added = "".join(letter for letter in letters if letter not in shared)
    w, a, b = (part.astype(jnp.float32) for part in (kernel, a, b))
    square = jnp.sum(jnp.square(w), axis=tuple(letters.index(letter) for letter in shared))
    cross = jnp.einsum(f"{letters},{shared}R->R{added}", w, a)
    gram = jnp.einsum(f"{shared}R,{shared}Q->QR", a, a)
    beside = 2 * scale * cross + scale**2 * jnp.einsum(f"QR,R{added}->Q{added}", gram, b)
    return jnp.sqrt(square + jnp.sum(b * beside, axis=0))


def with_rows(lora: Lora, letters: str, table: jax.Array, *, declare: Declare) -> jax.Array:
    """`table` "VD" or "DV" in f32 with the trained rows of `lora.tokens` in their places.

    In f32 because thousands of small contributions to one row stop adding up in bfloat16.
    """
    ids = jnp.asarray(lora.tokens, jnp.int32)
    table = table.astype(jnp.float32)
    by_token = table if letters == "VD" else table.T

    def begin(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return by_token[ids]

    rows = declare("rows", "ND", begin)
    by_token = by_token.at[ids].set(rows)
    return by_token if letters == "VD" else by_token.T


def merged_kernel(
    leaves: Mapping[str, np.ndarray], kernel: np.ndarray, letters: str, shared: str, lora: Lora
) -> np.ndarray:
    """Merge the adapter `leaves` into one layer's kernel of axes `letters`, f32, on the host."""
    added = "".join(letter for letter in letters if letter not in shared)
    delta = np.einsum(f"{shared}R,R{added}->{letters}", leaves["a"], leaves["b"], optimize=True)
    whole: np.ndarray = kernel.astype(np.float32) + np.float32(lora.scale) * delta
    if "magnitude" not in leaves:
        return whole
    axes = tuple(letters.index(letter) for letter in shared)
    length = np.sqrt(np.sum(np.square(whole), axis=axes, keepdims=True))
    scaled: np.ndarray = whole * (np.expand_dims(leaves["magnitude"], axes) / length)
    return scaled
