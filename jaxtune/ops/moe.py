"""A mixture of experts on flat tokens: who goes where, and what the experts make of it.

    chosen = route(logits_NE, per_token=2, softmax_over="chosen")
    y_ND   = apply_experts(x_ND, experts, chosen, activation=jax.nn.silu, clamp=None)

Dropless: every token reaches all the experts it chose, whatever the load. `apply_experts` sorts the
tokens by expert and multiplies each run with its own expert (`jax.lax.ragged_dot`);
`apply_experts_reference`, the definition, runs every expert on every token. On a CPU XLA expands
`ragged_dot` to a product with all experts, so there the two cost about the same.

`ops/expert_parallel.py` is for experts that live on devices of their own.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Experts(NamedTuple):
    """Gated MLPs side by side: `gate`, `up` `[E D F]`, `down` `[E F D]`; biases or None."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array
    gate_bias: jax.Array | None = None  # [E F]
    up_bias: jax.Array | None = None  # [E F]
    down_bias: jax.Array | None = None  # [E D]


class Chosen(NamedTuple):
    """The experts of each token and their shares, `[... k]` int32 and float32."""

    experts: jax.Array
    shares: jax.Array


class Order(NamedTuple):
    """Copies of tokens, one for each of their experts, sorted by expert; int32.

    Copy c is of token c // k, for the expert it chose as number c % k.
    """

    copies: jax.Array  # [... S] with S = N k
    sizes: jax.Array  # [... E] how many each expert has


class Load(NamedTuple):
    """Sums over tokens that balance is judged by, float32: how often each expert was among the
    chosen `[E]`, its probability `[E]`, and how many tokens there were `[]`.
    """

    chosen: jax.Array
    probability: jax.Array
    tokens: jax.Array


Activation = Callable[[jax.Array], jax.Array]
Clamp = tuple[float, float] | None


def route(logits: jax.Array, *, per_token: int, softmax_over: str) -> Chosen:
    """Router logits `[... E]` -> the `per_token` largest of each token; softmax in float32.

    Shares are of the softmax over "all" experts, and then sum to less than one, or over the
    "chosen" ones. Of equal logits the lower expert is chosen.
    """
    logits = logits.astype(jnp.float32)
    best, experts = jax.lax.top_k(logits, per_token)
    if softmax_over == "chosen":
        return Chosen(experts, jax.nn.softmax(best, axis=-1))
    return Chosen(experts, jnp.exp(best - jax.nn.logsumexp(logits, axis=-1, keepdims=True)))


def load(logits: jax.Array, chosen: Chosen, counts: jax.Array) -> Load:
    """Sum the `Load` of router logits `[... E]`, for `balance`, over the tokens where `counts`
    `[...]`."""
    probability = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    counts = counts.astype(jnp.float32)
    hits = jax.nn.one_hot(chosen.experts, logits.shape[-1], dtype=jnp.float32)
    return Load(
        jnp.einsum("...kE,...->E", hits, counts),
        jnp.einsum("...E,...->E", probability, counts),
        counts.sum(),
    )


def balance(load: Load) -> jax.Array:
    """The load-balancing loss (Switch Transformer, arXiv 2101.03961, eq. 4-6), float32 `[]`.

    E x sum_e (share of tokens that chose e) x (mean probability of e), at its least, k, when all
    experts are used alike. A token has k chosen experts. Zero when no token counts.
    """
    tokens = jnp.where(load.tokens > 0, load.tokens, 1.0)
    return len(load.chosen) * jnp.sum((load.chosen / tokens) * (load.probability / tokens))


def apply_experts_reference(
    x: jax.Array, experts: Experts, chosen: Chosen, *, activation: Activation, clamp: Clamp
) -> jax.Array:
    """Apply every expert to every token, most of them at share zero: the definition.

    Arguments as `apply_experts` has them.
    """
    E = len(experts.gate)
    share_NE = jnp.einsum("Nk,NkE->NE", chosen.shares, jax.nn.one_hot(chosen.experts, E))

    def affine(equation: str, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        y = jnp.einsum(equation, x, kernel)
        return y if bias is None else y + bias[None]

    gate_NEF = affine("ND,EDF->NEF", x, experts.gate, experts.gate_bias)
    up_NEF = affine("ND,EDF->NEF", x, experts.up, experts.up_bias)
    inner_NEF = gate_and_up(gate_NEF, up_NEF, activation, clamp)
    y_NED = affine("NEF,EFD->NED", inner_NEF, experts.down, experts.down_bias)
    return jnp.einsum("NED,NE->ND", y_NED.astype(jnp.float32), share_NE).astype(x.dtype)


def apply_experts(
    x: jax.Array, experts: Experts, chosen: Chosen, *, activation: Activation, clamp: Clamp
) -> jax.Array:
    """Apply the chosen experts to `x` `[N D]`, summed by their shares in float32 -> `[N D]`.

    An expert is down(activation(gate(x)) * up(x)), or with `clamp` = (alpha, limit) what
    `spec.MoeSpec` says. The result has the dtype of `x`. With F cut into slices the results of
    the slices add up, if only one of them gets the bias of `down`.

    Tokens are sorted by expert (S = N k of them), go through three grouped products, and back.
    """
    (N, k), (E, D, _) = chosen.experts.shape, experts.gate.shape
    order_S, sizes_E = ordered(chosen.experts, E)
    back_S = jnp.argsort(order_S)
    sorted_S = _permuted(chosen.experts.reshape(N * k), order_S)
    copies_SD = jnp.broadcast_to(x[:, None], (N, k, D)).reshape(N * k, D)
    x_SD = _permuted(copies_SD, order_S)
    inner_SF = gated_inner(x_SD, experts, sizes_E, sorted_S, activation, clamp)
    y_SD = affine(inner_SF, experts.down, experts.down_bias, sizes_E, sorted_S)
    y_NkD = _permuted(y_SD, back_S).reshape(N, k, D).astype(jnp.float32)
    return jnp.einsum("NkD,Nk->ND", y_NkD, chosen.shares).astype(x.dtype)


def ordered(experts: jax.Array, count: int) -> Order:
    """The copies of tokens that chose `experts` `[N k]` of `count`.

    experts 1 0, 2 1  ->  copies 1 0 3 2, sizes 1 2 1
    """
    expert_S = experts.reshape(-1)
    sizes_E = jnp.bincount(expert_S, length=count)
    return Order(jnp.argsort(expert_S, stable=True).astype(jnp.int32), sizes_E.astype(jnp.int32))


def affine(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, sizes: jax.Array, expert: jax.Array
) -> jax.Array:
    """Rows `x` `[S ...]`, sorted by `expert` `[S]`, each with the kernel and bias of its own."""
    y_S = jax.lax.ragged_dot(x, kernel, sizes)
    return y_S if bias is None else y_S + bias[expert]


def gated_inner(
    x: jax.Array,
    experts: Experts,
    sizes: jax.Array,
    expert: jax.Array,
    activation: Activation,
    clamp: Clamp,
) -> jax.Array:
    """Compute the input of `down`, `[S F]`."""
    gate_SF = affine(x, experts.gate, experts.gate_bias, sizes, expert)
    up_SF = affine(x, experts.up, experts.up_bias, sizes, expert)
    return gate_and_up(gate_SF, up_SF, activation, clamp)


def _permuted(x: jax.Array, order: jax.Array) -> jax.Array:
    """`x[order]`; that no index comes twice makes the gradient a permutation too, not a sum."""
    return x.at[order].get(unique_indices=True, mode="promise_in_bounds")


def gate_and_up(gate: jax.Array, up: jax.Array, activation: Activation, clamp: Clamp) -> jax.Array:
    if clamp is None:
        return activation(gate) * up
    alpha, limit = clamp
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)
