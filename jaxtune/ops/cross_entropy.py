"""From hidden states to logits, and to their cross-entropy without ever holding all of them.

`Head` is the one place that knows how hidden states become logits: training, evaluation and
decoding all read it. The loss knows nothing of prompts, padding ids or ignore labels: what counts
is in `weights`. It returns sums, never a mean, so that microbatches, devices and hosts can be
added up before the one division.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

SMALL_LOGITS = 2**23  # elements, all rows together: below this one chunk is faster than many
SHORTEST_CHUNK = 256
MOST_CHUNKS = 16


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["kernel"], meta_fields=["scale", "softcap"]
)
@dataclass(frozen=True)
class Head:
    """logits = softcap * tanh(scale * hidden @ kernel / softcap); `kernel` `[D V]`, any dtype.

    Without `softcap` logits are not bounded. A pytree whose only leaf is the kernel.
    """

    kernel: jax.Array
    scale: float = 1.0
    softcap: float | None = None


class Sums(NamedTuple):
    """Float32 scalars over tokens: sum(w * loss), sum(w), sum(w * [the best guess is right]).

    `penalty` is what an objective has minimised beside `loss`, on the same scale; none from here.
    """

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array
    penalty: jax.Array | float = 0.0


def logits(hidden: jax.Array, head: Head) -> jax.Array:
    """Float32 `[B T V]` of `hidden` `[B T D]`, multiplied in the dtype of `hidden`."""
    logits_BTV = _product(hidden, head.kernel)
    if head.scale != 1.0:
        logits_BTV = logits_BTV * head.scale
    if head.softcap is not None:
        logits_BTV = head.softcap * jnp.tanh(logits_BTV / head.softcap)
    return logits_BTV


def linear_cross_entropy(
    hidden: jax.Array,
    head: Head,
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunk: int | None = None,
) -> Sums:
    """Weighted cross-entropy of the logits of `hidden` `[B T D]` against `targets` `[B T]`.

    `weights` `[B T]` is each target's share in the sums; at weight 0 a target may be any id below
    V. Matrix products run in the dtype of `hidden` with float32 sums, all else in float32; the
    gradient of the kernel is added up over chunks in its own dtype: hand it over in float32 and
    already gathered. `chunk` is positions of T at a time (`[B chunk V]` logits are alive, and
    computed again in the backward pass); the default asks for 256 or more in 16 chunks or fewer.
    A best guess shared by several ids is the lowest.
    """
    B, T = targets.shape
    if chunk is None:
        small = B * T * head.kernel.shape[1] <= SMALL_LOGITS
        chunk = T if small else max(SHORTEST_CHUNK, -(-T // MOST_CHUNKS))
    chunks = -(-T // chunk)
    if chunks == 1:
        return _sums(hidden, head, targets, weights)

    def split(x_BT: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, chunks * chunk - T)] + [(0, 0)] * (x_BT.ndim - 2)
        x_BnT = jnp.pad(x_BT, padding).reshape(B, chunks, chunk, *x_BT.shape[2:])
        return jnp.moveaxis(x_BnT, 1, 0)  # along T: rows stay on the devices that hold them

    def add(sums: Sums, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Sums, None]:
        hidden_BtD, targets_Bt, weights_Bt = part
        here = _sums(hidden_BtD, head, targets_Bt, weights_Bt)
        return jax.tree.map(jnp.add, sums, here), None

    zero = jnp.zeros((), jnp.float32)
    parts = (split(hidden), split(targets), split(weights))
    sums, _ = jax.lax.scan(jax.checkpoint(add, prevent_cse=False), Sums(zero, zero, zero), parts)
    return sums


def _sums(hidden_BTD: jax.Array, head: Head, targets_BT: jax.Array, weights_BT: jax.Array) -> Sums:
    logits_BTV = logits(hidden_BTD, head)
    weights_BT = weights_BT.astype(jnp.float32)
    ids_11V = jnp.arange(logits_BTV.shape[-1], dtype=targets_BT.dtype)[None, None, :]
    # A masked sum, not a gather: V may be spread over devices.
    at_target_BT = jnp.sum(jnp.where(ids_11V == targets_BT[..., None], logits_BTV, 0.0), axis=-1)
    loss_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - at_target_BT
    hit_BT = _is_best(jax.lax.stop_gradient(logits_BTV), at_target_BT, targets_BT)
    return Sums(
        loss=jnp.sum(weights_BT * loss_BT),
        weight=jnp.sum(weights_BT),
        correct=jnp.sum(weights_BT * hit_BT),
    )


def _is_best(logits_BTV: jax.Array, at_target_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """`argmax(logits) == targets`, by two plain reductions: an argmax over V takes as long as the
    product that made the logits on a CPU, and gathers a V that is spread over devices."""
    top_BT = jnp.max(logits_BTV, axis=-1)
    ids_11V = jnp.arange(logits_BTV.shape[-1], dtype=targets_BT.dtype)[None, None, :]
    as_good_BTV = logits_BTV >= top_BT[..., None]
    lower_BT = jnp.any(as_good_BTV & (ids_11V < targets_BT[..., None]), axis=-1)
    return (at_target_BT >= top_BT) & ~lower_BT


@jax.custom_vjp
def _product(hidden_BTD: jax.Array, head_DV: jax.Array) -> jax.Array:
    """Float32 `[B T V]`; both directions multiply in the dtype of `hidden`.

    The derivative JAX would write multiplies a float32 cotangent, many times slower than bfloat16
    on the devices that have it, and rounds the head's gradient of every chunk to bfloat16.
    """
    head_DV = head_DV.astype(hidden_BTD.dtype)
    return jnp.einsum("BTD,DV->BTV", hidden_BTD, head_DV, preferred_element_type=jnp.float32)


def _product_forward(
    hidden_BTD: jax.Array, head_DV: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(hidden_BTD, head_DV), (hidden_BTD, head_DV)


def _product_backward(
    saved: tuple[jax.Array, jax.Array], d_logits_BTV: jax.Array
) -> tuple[jax.Array, jax.Array]:
    hidden_BTD, head_DV = saved
    dtype = hidden_BTD.dtype
    d_logits_BTV = d_logits_BTV.astype(dtype)
    f32 = jnp.float32
    d_hidden = jnp.einsum(
        "BTV,DV->BTD", d_logits_BTV, head_DV.astype(dtype), preferred_element_type=f32
    )
    d_head = jnp.einsum("BTD,BTV->DV", hidden_BTD, d_logits_BTV, preferred_element_type=f32)
    return d_hidden.astype(dtype), d_head.astype(head_DV.dtype)


_product.defvjp(_product_forward, _product_backward)
