"""A mixture of experts on flat tokens: who goes where, and what the experts make of it.

    chosen = route(logits_NE, per_token=2, softmax_over="chosen")
    y_ND   = mix(x_ND, experts, chosen, activation=jax.nn.silu, clamp=None)

Dropless: every token reaches all the experts it chose, whatever the load. `reference` runs every
expert on every token; `ragged` sorts the tokens by expert and multiplies each run with its own
expert (`jax.lax.ragged_dot`), and is what the model uses. On a CPU XLA expands `ragged_dot` to a
product with all experts, so there the two cost about the same.

Where experts live on devices of their own, each of them mixes what its own experts make of the
tokens of all (`mix_own`), and what they made is added up.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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
    """What `balance` needs of router logits `[... E]`, over the tokens where `counts` `[...]`."""
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


def mix(
    x: jax.Array,
    experts: Experts,
    chosen: Chosen,
    *,
    activation: Activation,
    clamp: Clamp,
    impl: str = "ragged",
) -> jax.Array:
    """`x` `[N D]` through the chosen experts, summed by their shares in float32 -> `[N D]`.

    An expert is down(activation(gate(x)) * up(x)), or with `clamp` = (alpha, limit) what
    `spec.MoeSpec` says. The result has the dtype of `x`. With F cut into slices the results of
    the slices add up, if only one of them gets the bias of `down`.
    """
    if impl not in IMPLEMENTATIONS:
        known = ", ".join(sorted(IMPLEMENTATIONS))
        raise ValueError(f"mixture implementation is {impl!r}; expected one of {known}")
    return IMPLEMENTATIONS[impl](x, experts, chosen, activation=activation, clamp=clamp)


def reference(
    x: jax.Array, experts: Experts, chosen: Chosen, *, activation: Activation, clamp: Clamp
) -> jax.Array:
    """Every expert on every token, most of them at share zero."""
    E = len(experts.gate)
    share_NE = jnp.einsum("Nk,NkE->NE", chosen.shares, jax.nn.one_hot(chosen.experts, E))

    def affine(equation: str, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        y = jnp.einsum(equation, x, kernel)
        return y if bias is None else y + bias[None]

    gate_NEF = affine("ND,EDF->NEF", x, experts.gate, experts.gate_bias)
    up_NEF = affine("ND,EDF->NEF", x, experts.up, experts.up_bias)
    inner_NEF = _gated(gate_NEF, up_NEF, activation, clamp)
    y_NED = affine("NEF,EFD->NED", inner_NEF, experts.down, experts.down_bias)
    return jnp.einsum("NED,NE->ND", y_NED.astype(jnp.float32), share_NE).astype(x.dtype)


def ragged(
    x: jax.Array, experts: Experts, chosen: Chosen, *, activation: Activation, clamp: Clamp
) -> jax.Array:
    """Tokens sorted by expert (S = N k of them), three grouped products, and back."""
    (N, k), (E, D, _) = chosen.experts.shape, experts.gate.shape
    order_S, sizes_E = ordered(chosen.experts, E)
    back_S = jnp.argsort(order_S)
    sorted_S = _permuted(chosen.experts.reshape(N * k), order_S)
    copies_SD = jnp.broadcast_to(x[:, None], (N, k, D)).reshape(N * k, D)
    x_SD = _permuted(copies_SD, order_S)
    inner_SF = _inner(x_SD, experts, sizes_E, sorted_S, activation, clamp)
    y_SD = _affine(inner_SF, experts.down, experts.down_bias, sizes_E, sorted_S)
    y_NkD = _permuted(y_SD, back_S).reshape(N, k, D).astype(jnp.float32)
    return jnp.einsum("NkD,Nk->ND", y_NkD, chosen.shares).astype(x.dtype)


def ordered(experts: jax.Array, count: int) -> Order:
    """The copies of tokens that chose `experts` `[N k]` of `count`.

    experts 1 0, 2 1  ->  copies 1 0 3 2, sizes 1 2 1
    """
    expert_S = experts.reshape(-1)
    sizes_E = jnp.bincount(expert_S, length=count)
    return Order(jnp.argsort(expert_S, stable=True).astype(jnp.int32), sizes_E.astype(jnp.int32))


def _affine(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, sizes: jax.Array, expert: jax.Array
) -> jax.Array:
    """Rows `x` `[S ...]`, sorted by `expert` `[S]`, each with the kernel and bias of its own."""
    y_S = jax.lax.ragged_dot(x, kernel, sizes)
    return y_S if bias is None else y_S + bias[expert]


def _inner(
    x: jax.Array,
    experts: Experts,
    sizes: jax.Array,
    expert: jax.Array,
    activation: Activation,
    clamp: Clamp,
) -> jax.Array:
    """What `down` is applied to, `[S F]`."""
    gate_SF = _affine(x, experts.gate, experts.gate_bias, sizes, expert)
    up_SF = _affine(x, experts.up, experts.up_bias, sizes, expert)
    return _gated(gate_SF, up_SF, activation, clamp)


def _permuted(x: jax.Array, order: jax.Array) -> jax.Array:
    """`x[order]`; that no index comes twice makes the gradient a permutation too, not a sum."""
    return x.at[order].get(unique_indices=True, mode="promise_in_bounds")


def _gated(gate: jax.Array, up: jax.Array, activation: Activation, clamp: Clamp) -> jax.Array:
    if clamp is None:
        return activation(gate) * up
    alpha, limit = clamp
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


# -- experts on devices of their own ---------------------------------------------------------------

ROUND = 2**15  # copies that are worth a round: each one passes over all of the experts' gradients
MOST = 4  # rounds on average
TURNS = "turns_"  # names a loop by the turns to expect, for who reads the compiled program


def mix_own(
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
    """Tokens `x` `[P N D]` of P devices through those they chose of some `experts` -> `[P N D]`.

    The experts are E of all, from number `first`; `order` `[P S]` and `[P all]`, and `shares`
    `[P N k]`, are each device's. What different devices make so of one token adds up to `mix`.
    Summed in float32, then in the dtype of `x`.

    How many copies there are is known only at run time, from none to every token's k. They are
    taken `rows` at a time, in as many rounds as it takes, and memory is that of one round; it is
    made again in the backward pass.
    """
    (P, N, D), k, E = x.shape, shares.shape[-1], len(experts.gate)
    rows = round_rows(N * k, P * N * min(k, E)) if rows is None else rows
    static = _Static(rows, -(-N * k // rows), k, activation, clamp)
    run = functools.partial(_mix_own, static)
    y_MD = run(x.reshape(P * N, D), experts, shares.reshape(-1), _runs(order, first, E))
    return y_MD.reshape(P, N, D)


def round_rows(mean: int, most: int) -> int:
    """Copies of a round, of which a device has `mean` on average and never more than `most`: with
    an eighth to spare, so that experts nearly alike in load need no round more."""
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
    """Where the copies for some experts lie: in P orders one behind the other they are P E runs.

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
    """`rows` C copies, sorted by expert; behind the last one come some that no expert sees: what
    a product says of them means nothing."""

    copies: jax.Array  # [C]
    real: jax.Array  # [C] whether it is one for these experts
    expert: jax.Array  # [C] of the own ones
    sizes: jax.Array  # [E]

    def kept(self, x: jax.Array) -> jax.Array:
        """`x` `[C ...]`, zero where no copy is."""
        real = self.real.reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(jnp.broadcast_to(real, x.shape), x, 0)


def _taken(x: jax.Array, rows: jax.Array) -> jax.Array:
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
    return _Round(_taken(runs.copies, from_C), real_C, run_C // P, sizes_E)


def _rounds(
    static: _Static, runs: _Runs, E: int, turn: Callable[[_Round, Any], Any], start: Any
) -> Any:
    """`turn(round, so far)` over as many rounds as there are copies for."""

    def body(number: jax.Array, so_far: Any) -> Any:
        return turn(_round(runs, number, static.rows, E), so_far)

    with jax.named_scope(f"{TURNS}{static.turns}"):
        return jax.lax.fori_loop(0, -(-runs.ends[-1] // static.rows), body, start)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix_own(
    static: _Static, x: jax.Array, experts: Experts, shares: jax.Array, runs: _Runs
) -> jax.Array:
    """`x` `[M D]`, `shares` `[M k]` flat -> `[M D]`."""

    def turn(at: _Round, y_MD: jax.Array) -> jax.Array:
        token_C = at.copies // static.k
        inner_CF = _inner(_taken(x, token_C), experts, at.sizes, at.expert, *static[3:])
        y_CD = _affine(inner_CF, experts.down, experts.down_bias, at.sizes, at.expert)
        share_CD = jnp.broadcast_to(_taken(shares, at.copies)[:, None], y_CD.shape)
        more_CD = at.kept(share_CD * y_CD.astype(jnp.float32))
        return y_MD.at[token_C].add(more_CD, mode="promise_in_bounds")

    zeros = jnp.zeros(x.shape, jnp.float32)
    return _rounds(static, runs, len(experts.gate), turn, zeros).astype(x.dtype)


def _mix_own_forward(static: _Static, *given: Any) -> tuple[jax.Array, Any]:
    return _mix_own(static, *given), given


def _mix_own_backward(static: _Static, given: Any, d_y: jax.Array) -> Any:
    x, experts, shares, runs = given
    f32 = jnp.float32
    # Turned once, not in every round.
    gate_EFD, up_EFD, down_EDF = (jnp.swapaxes(kernel, 1, 2) for kernel in experts[:3])

    def turn(at: _Round, so_far: tuple[jax.Array, Experts, jax.Array]) -> Any:
        d_x_MD, d_experts, d_shares = so_far
        token_C = at.copies // static.k
        x_CD, d_y_CD = _taken(x, token_C), _taken(d_y, token_C)
        share_C1 = _taken(shares, at.copies)[:, None]
        # Zero where no copy is, so that what gradients of kernels sum over is finite everywhere.
        gate_CF = at.kept(_affine(x_CD, experts.gate, experts.gate_bias, at.sizes, at.expert))
        up_CF = at.kept(_affine(x_CD, experts.up, experts.up_bias, at.sizes, at.expert))
        inner_CF, of_gated = jax.vjp(lambda a, b: _gated(a, b, *static[3:]), gate_CF, up_CF)

        def shared(d: jax.Array) -> jax.Array:
            return (jnp.broadcast_to(share_C1, d.shape) * d.astype(f32)).astype(d.dtype)

        # The gradient of a share is y * d_y, which is inner * (down d_y): y is not made again.
        d_inner_CF = at.kept(jax.lax.ragged_dot(d_y_CD, down_EDF, at.sizes))
        d_share_C = jnp.sum(d_inner_CF.astype(f32) * inner_CF.astype(f32), axis=1)
        if experts.down_bias is not None:
            bias_CD = experts.down_bias[at.expert].astype(f32)
            d_share_C = d_share_C + jnp.sum(d_y_CD.astype(f32) * bias_CD, axis=1)
        d_y_CD = shared(d_y_CD)
        d_gate_CF, d_up_CF = of_gated(shared(d_inner_CF))
        d_x_CD = jax.lax.ragged_dot(d_gate_CF, gate_EFD, at.sizes).astype(f32)
        d_x_CD = d_x_CD + jax.lax.ragged_dot(d_up_CF, up_EFD, at.sizes).astype(f32)

        def of_kernel(so_far: jax.Array, x: jax.Array, d: jax.Array) -> jax.Array:
            product = jax.linear_transpose(
                lambda kernel: jax.lax.ragged_dot(x, kernel, at.sizes),
                jax.ShapeDtypeStruct(so_far.shape, x.dtype),
            )
            return so_far + product(d)[0].astype(f32)

        def of_bias(so_far: jax.Array | None, d: jax.Array) -> jax.Array | None:
            return None if so_far is None else so_far.at[at.expert].add(at.kept(d.astype(f32)))

        # Where no copy is, a place behind the last: dropped.
        place_C = jnp.where(at.real, at.copies, len(shares) + jnp.arange(static.rows))
        return (
            d_x_MD.at[token_C].add(at.kept(d_x_CD), mode="promise_in_bounds"),
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
    made = _rounds(static, runs, len(experts.gate), turn, zeros)
    return *jax.tree.map(lambda d, x: d.astype(x.dtype), made, given[:3]), None


_mix_own.defvjp(_mix_own_forward, _mix_own_backward)


IMPLEMENTATIONS = {"reference": reference, "ragged": ragged}
