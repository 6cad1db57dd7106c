"""Experts on devices of their own: each device applies its experts to the tokens of all of them.

The results of the devices for one token add up to `moe.apply_experts`. How many copies of tokens a
device has is known only at run time, so they are taken in rounds of a fixed number of rows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxtune.ops.moe import (
    Activation,
    Clamp,
    Experts,
    Order,
    affine,
    gate_and_up,
    gated_inner,
)

S = TypeVar("S")  # the state of a loop

ROUND = 2**15  # copies that are worth a round: each one passes over all of the experts' gradients
MOST = 4  # rounds on average
TURNS = "turns_"  # names a loop by the rounds to expect, for a reader of the compiled program


def apply_local_experts(
    x: jax.Array,
    experts: Experts,
    order: Order,
    shares: jax.Array,
    *,
    first: jax.Array | int,
    activation: Activation,
    clamp: Clamp,
    rows: int | None = None,
) -> jax.Array:
    """Apply some `experts` to the tokens `x` `[P N D]` of P devices that chose them -> `[P N D]`.

    The experts are E of all, from number `first`; `order` `[P S]` and `[P all]`, and `shares`
    `[P N k]`, are each device's. The results of the devices for one token add up.
    Summed in float32, then in the dtype of `x`.

    How many copies there are is known only at run time, from none to every token's k. They are
    taken `rows` at a time, in as many rounds as it takes, and memory is that of one round; it is
    made again in the backward pass.
    """
    (P, N, D), k, E = x.shape, shares.shape[-1], len(experts.gate)
    rows = round_rows(N * k, P * N * min(k, E)) if rows is None else rows
    static = _Static(rows, -(-N * k // rows), k, activation, clamp)
    run = functools.partial(_local_experts, static)
    y_MD = run(x.reshape(P * N, D), experts, shares.reshape(-1), _runs(order, first, E))
    return y_MD.reshape(P, N, D)


def round_rows(mean: int, most: int) -> int:
    """Choose the copies of a round, of which a device has `mean` on average and at most `most`.

    With an eighth to spare, so that experts nearly alike in load need no round more.
    """
    rounds = min(max(mean // ROUND, 1), MOST)
    tile = 512 if mean >= ROUND else 8
    return min(most, -(-9 * mean // (8 * rounds * tile)) * tile)


class _Static(NamedTuple):
    rows: int  # of a round
    turns: int  # rounds to expect
    k: int
    activation: Activation
    clamp: Clamp


class _Runs(NamedTuple):
    """The runs of copies for some experts: P E of them, in P orders one after the other.

    Run e P + p are those of expert e that device p sent; `ends` are how far they reach when they
    stand one behind the other, `shifts` what leads from a place there to one in `copies`.
    """

    copies: jax.Array  # [P S] of all tokens, numbered device by device
    ends: jax.Array  # [E P]
    shifts: jax.Array  # [E P]


def _runs(order: Order, first: jax.Array | int, E: int) -> _Runs:
    P, S = order.copies.shape
    device_P1 = S * jnp.arange(P, dtype=jnp.int32)[:, None]
    starts = (
        jnp.cumsum(order.sizes, axis=1)
        - order.sizes
        + jnp.broadcast_to(device_P1, order.sizes.shape)
    )

    def own(of_all: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(of_all, first, E, axis=1).T.reshape(-1)

    sizes_EP = own(order.sizes)
    ends_EP = jnp.cumsum(sizes_EP)
    copies_PS = order.copies + jnp.broadcast_to(device_P1, order.copies.shape)
    return _Runs(copies_PS.reshape(-1), ends_EP, own(starts) - (ends_EP - sizes_EP))


class _Round(NamedTuple):
    """A number C of copies, sorted by expert; after the last come some that no expert sees.

    Products with those mean nothing.
    """

    copies: jax.Array  # [C]
    real: jax.Array  # [C] whether it is one for these experts
    expert: jax.Array  # [C] of the own ones
    sizes: jax.Array  # [E]

    def masked(self, x: jax.Array) -> jax.Array:
        """`x` `[C ...]`, zero where no copy is."""
        real = self.real.reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(jnp.broadcast_to(real, x.shape), x, 0)


def _take(x: jax.Array, rows: jax.Array) -> jax.Array:
    return x.at[rows].get(mode="promise_in_bounds")


def _round(runs: _Runs, number: jax.Array, rows: int, E: int) -> _Round:
    begin = number * rows
    place_C = begin + jnp.arange(rows, dtype=jnp.int32)
    real_C = place_C < runs.ends[-1]
    run_C = jnp.searchsorted(runs.ends, place_C, side="right", method="compare_all")
    run_C = jnp.minimum(run_C, len(runs.ends) - 1).astype(jnp.int32)
    # Behind the last copy any other.
    from_C = jnp.where(real_C, place_C + runs.shifts[run_C], place_C % len(runs.copies))
    P = len(runs.ends) // E
    until_E = jnp.minimum(jnp.maximum(runs.ends[P - 1 :: P] - begin, 0), rows)
    sizes_E = jnp.diff(until_E, prepend=0).astype(jnp.int32)
    return _Round(_take(runs.copies, from_C), real_C, run_C // P, sizes_E)


def _rounds(static: _Static, runs: _Runs, E: int, body: Callable[[_Round, S], S], start: S) -> S:
    """`body(round, so far)` over as many rounds as there are copies for."""

    def one(number: jax.Array, totals: S) -> S:
        return body(_round(runs, number, static.rows, E), totals)

    with jax.named_scope(f"{TURNS}{static.turns}"):
        last: S = jax.lax.fori_loop(0, -(-runs.ends[-1] // static.rows), one, start)
        return last


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _local_experts(
    static: _Static, x: jax.Array, experts: Experts, shares: jax.Array, runs: _Runs
) -> jax.Array:
    """`x` `[M D]`, `shares` `[M k]` flat -> `[M D]`."""

    def body(at: _Round, y_MD: jax.Array) -> jax.Array:
        token_C = at.copies // static.k
        inner_CF = gated_inner(_take(x, token_C), experts, at.sizes, at.expert, *static[3:])
        y_CD = affine(inner_CF, experts.down, experts.down_bias, at.sizes, at.expert)
        share_CD = jnp.broadcast_to(_take(shares, at.copies)[:, None], y_CD.shape)
        more_CD = at.masked(share_CD * y_CD.astype(jnp.float32))
        return y_MD.at[token_C].add(more_CD, mode="promise_in_bounds")

    zeros = jnp.zeros(x.shape, jnp.float32)
    return _rounds(static, runs, len(experts.gate), body, zeros).astype(x.dtype)


def _forward(static: _Static, *args: Any) -> tuple[jax.Array, Any]:
    return _local_experts(static, *args), args


def _backward(static: _Static, args: Any, d_y: jax.Array) -> Any:
    x, experts, shares, runs = args
    f32 = jnp.float32
    # Turned once, not in every round.
    gate_EFD, up_EFD, down_EDF = (jnp.swapaxes(kernel, 1, 2) for kernel in experts[:3])

    def body(at: _Round, totals: tuple[jax.Array, Experts, jax.Array]) -> Any:
        d_x_MD, d_experts, d_shares = totals
        token_C = at.copies // static.k
        x_CD, d_y_CD = _take(x, token_C), _take(d_y, token_C)
        share_C1 = _take(shares, at.copies)[:, None]
        # Zero where no copy is, so that what gradients of kernels sum over is finite everywhere.
        gate_CF = at.masked(affine(x_CD, experts.gate, experts.gate_bias, at.sizes, at.expert))
        up_CF = at.masked(affine(x_CD, experts.up, experts.up_bias, at.sizes, at.expert))
        inner_CF, of_gated = jax.vjp(lambda a, b: gate_and_up(a, b, *static[3:]), gate_CF, up_CF)

        def shared(d: jax.Array) -> jax.Array:
            return (jnp.broadcast_to(share_C1, d.shape) * d.astype(f32)).astype(d.dtype)

        # The gradient of a share is y * d_y, which is inner * (down d_y): y is not made again.
        d_inner_CF = at.masked(jax.lax.ragged_dot(d_y_CD, down_EDF, at.sizes))
        d_share_C = jnp.sum(d_inner_CF.astype(f32) * inner_CF.astype(f32), axis=1)
        if experts.down_bias is not None:
            bias_CD = experts.down_bias[at.expert].astype(f32)
            d_share_C = d_share_C + jnp.sum(d_y_CD.astype(f32) * bias_CD, axis=1)
        d_y_CD = shared(d_y_CD)
        d_gate_CF, d_up_CF = of_gated(shared(d_inner_CF))
        d_x_CD = jax.lax.ragged_dot(d_gate_CF, gate_EFD, at.sizes).astype(f32)
        d_x_CD = d_x_CD + jax.lax.ragged_dot(d_up_CF, up_EFD, at.sizes).astype(f32)

        def of_kernel(totals: jax.Array, x: jax.Array, d: jax.Array) -> jax.Array:
            product = jax.linear_transpose(
                lambda kernel: jax.lax.ragged_dot(x, kernel, at.sizes),
                jax.ShapeDtypeStruct(totals.shape, x.dtype),
            )
            (d_kernel,) = product(d)
            return jnp.add(totals, d_kernel.astype(f32))

        def of_bias(totals: jax.Array | None, d: jax.Array) -> jax.Array | None:
            return None if totals is None else totals.at[at.expert].add(at.masked(d.astype(f32)))

        # Where no copy is, a place behind the last: dropped.
        place_C = jnp.where(at.real, at.copies, len(shares) + jnp.arange(static.rows))
        return (
            d_x_MD.at[token_C].add(at.masked(d_x_CD), mode="promise_in_bounds"),
            Experts(
                of_kernel(d_experts.gate, x_CD, d_gate_CF),
                of_kernel(d_experts.up, x_CD, d_up_CF),
                of_kernel(d_experts.down, inner_CF, d_y_CD),
                of_bias(d_experts.gate_bias, d_gate_CF),
                of_bias(d_experts.up_bias, d_up_CF),
                of_bias(d_experts.down_bias, d_y_CD),
            ),
            d_shares.at[place_C].set(d_share_C, mode="drop", unique_indices=True),
        )

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, f32), (x, experts, shares))
    made = _rounds(static, runs, len(experts.gate), body, zeros)
    return *jax.tree.map(lambda d, x: d.astype(x.dtype), made, args[:3]), None


_local_experts.defvjp(_forward, _backward)
