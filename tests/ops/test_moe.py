"""The mixture against loops over tokens and experts, values and gradients."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.ops.expert_parallel import apply_local_experts, round_rows
from jaxtune.ops.moe import (
    Chosen,
    Experts,
    Load,
    Order,
    apply_experts,
    apply_experts_reference,
    balance,
    load,
    ordered,
    route,
)

N, D, F, E = 13, 6, 10, 5


def _experts(seed: int, *, biases: bool) -> Experts:
    rng = np.random.default_rng(seed)
    shapes = [(E, D, F), (E, D, F), (E, F, D), (E, F), (E, F), (E, D)]
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    return Experts(*arrays) if biases else Experts(*arrays[:3])


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _by_loops(x, experts: Experts, chosen: Chosen, clamp) -> np.ndarray:
    """One token and one expert at a time, float64."""
    parts = [None if part is None else np.asarray(part, np.float64) for part in experts]
    gates, ups, downs, gate_bias, up_bias, down_bias = parts
    out = np.zeros((N, D))
    for n in range(N):
        for e, share in zip(*(np.asarray(part[n]) for part in chosen), strict=True):
            row = np.asarray(x[n], np.float64)
            gate = row @ gates[e] + (0 if gate_bias is None else gate_bias[e])
            up = row @ ups[e] + (0 if up_bias is None else up_bias[e])
            if clamp is None:
                inner = _silu(gate) * up
            else:
                alpha, limit = clamp
                gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
                inner = gate / (1 + np.exp(-alpha * gate)) * (up + 1)
            y = inner @ downs[e] + (0 if down_bias is None else down_bias[e])
            out[n] += share * y
    return out


@pytest.mark.parametrize("apply", [apply_experts, apply_experts_reference])
@pytest.mark.parametrize(
    ("k", "biases", "clamp"),
    [(2, False, None), (3, True, (1.7, 1.5)), (1, True, None), (E, False, None)],
)
def test_mixture_is_that_of_the_loops(apply, k, biases, clamp):
    rng = np.random.default_rng(k)
    x, logits = (jnp.asarray(rng.normal(size=(N, n)), jnp.float32) for n in (D, E))
    chosen = route(logits, per_token=k, softmax_over="all")
    experts = _experts(k, biases=biases)
    got = jax.jit(partial(apply, activation=jax.nn.silu, clamp=clamp))(x, experts, chosen)
    np.testing.assert_allclose(got, _by_loops(x, experts, chosen, clamp), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("idle", [False, True])
def test_gradients_of_ragged_are_those_of_the_reference(idle):
    """Of tokens, router and all experts; also when all tokens choose the same two experts."""
    rng = np.random.default_rng(1)
    x, logits, probe = (jnp.asarray(rng.normal(size=(N, n)), jnp.float32) for n in (D, E, D))
    if idle:
        logits = logits + jnp.asarray([[0.0, 20.0, 0.0, 18.0, 0.0]])
    experts = _experts(1, biases=True)

    def loss(x, logits, experts, apply):
        chosen = route(logits, per_token=2, softmax_over="chosen")
        y = apply(x, experts, chosen, activation=jax.nn.silu, clamp=(1.7, 3.0))
        return jnp.sum(y * probe)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnames="apply")
    expected = gradient(x, logits, experts, apply=apply_experts_reference)
    found = gradient(x, logits, experts, apply=apply_experts)
    for want, got in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    assert (np.abs(found[2].gate).max(axis=(1, 2)) == 0).sum() == (3 if idle else 0)


def test_copies_are_sorted_by_expert():
    order = ordered(jnp.asarray([[1, 0], [2, 1]]), 4)
    assert order.copies.tolist() == [1, 0, 3, 2]
    assert order.sizes.tolist() == [1, 2, 1, 0]


def _by_devices(x_PND, experts, chosen, rows):
    """P devices with an even part of the experts each, added up."""
    P, each = len(x_PND), len(experts.gate) // len(x_PND)
    orders = [ordered(of_device, len(experts.gate)) for of_device in chosen.experts]
    order = Order(*(jnp.stack(part) for part in zip(*orders, strict=True)))
    return sum(
        apply_local_experts(
            x_PND,
            jax.tree.map(lambda part, p=p: part[p * each : (p + 1) * each], experts),
            order,
            chosen.shares,
            first=p * each,
            activation=jax.nn.silu,
            clamp=(1.7, 3.0),
            rows=rows,
        )
        for p in range(P)
    )


@pytest.mark.parametrize(("rows", "biases"), [(1, True), (5, False), (None, True)])
@pytest.mark.parametrize("loads", ["as they come", "all to one", "one of none", "one device alone"])
def test_experts_of_several_devices_add_up_to_the_mixture(rows, loads, biases):
    """Values and gradients, however many rounds; experts and devices with all copies or none."""
    P, E = 3, 6
    rng = np.random.default_rng(3)
    x, probe = (jnp.asarray(rng.normal(size=(P, 4, D)), jnp.float32) for _ in range(2))
    lean = {
        "as they come": np.zeros(E),
        "all to one": [0, 0, 0, 90, 0, 0],
        "one of none": [0, -90, 0, 0, 0, 0],
        "one device alone": [0, 0, 80, 90, 0, 0],
    }[loads]
    logits = jnp.asarray(rng.normal(size=(P, 4, E)) + np.broadcast_to(lean, (P, 4, E)), jnp.float32)
    shapes = [(E, D, F), (E, D, F), (E, F, D), (E, F), (E, F), (E, D)][: 6 if biases else 3]
    experts = Experts(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes))

    def loss(x, logits, experts, mixed):
        chosen = route(logits, per_token=2, softmax_over="all")
        y = mixed(x, experts, chosen)
        return jnp.sum(y * probe), y

    def reference(x, experts, chosen):
        flat = Chosen(*(part.reshape(-1, 2) for part in chosen))
        y = apply_experts_reference(
            x.reshape(-1, D), experts, flat, activation=jax.nn.silu, clamp=(1.7, 3.0)
        )
        return y.reshape(x.shape)

    def mixed(x, experts, chosen):
        return _by_devices(x, experts, chosen, rows)

    both = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
    expected, found = both(x, logits, experts, reference), both(x, logits, experts, mixed)
    for want, got in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    unused = {"all to one": 0, "one of none": 1, "one device alone": 4}
    if loads in unused:
        idle = np.abs(found[0][2].gate).max(axis=(1, 2)) == 0
        assert idle.sum() >= unused[loads]
        np.testing.assert_array_equal(idle, np.abs(expected[0][2].gate).max(axis=(1, 2)) == 0)


def test_rounds_spare_an_eighth_and_are_never_longer_than_all_there_is():
    assert round_rows(131_072, 524_288) == 36_864
    assert round_rows(32_768, 524_288) == 36_864
    assert round_rows(1 << 20, 1 << 22) == 294_912
    assert round_rows(64, 1 << 20) == 72
    assert round_rows(64, 16) == 16


def test_a_token_does_not_depend_on_the_others():
    rng = np.random.default_rng(2)
    x, logits = (jnp.asarray(rng.normal(size=(N, n)), jnp.float32) for n in (D, E))
    experts = _experts(2, biases=True)

    def run(x, logits):
        chosen = route(logits, per_token=2, softmax_over="all")
        return apply_experts(x, experts, chosen, activation=jax.nn.silu, clamp=None)

    whole, halves = run(x, logits), [run(x[cut], logits[cut]) for cut in (slice(5), slice(5, N))]
    np.testing.assert_allclose(whole, np.concatenate(halves), rtol=1e-5, atol=1e-5)


def test_shares_by_hand():
    logits = jnp.log(jnp.asarray([[1.0, 5.0, 2.0, 2.0], [4.0, 1.0, 1.0, 4.0]]))
    every = route(logits, per_token=2, softmax_over="all")
    assert every.experts.tolist() == [[1, 2], [0, 3]]  # of equals the lower
    np.testing.assert_allclose(every.shares, [[0.5, 0.2], [0.4, 0.4]], rtol=1e-6)
    chosen = route(logits, per_token=2, softmax_over="chosen")
    np.testing.assert_allclose(chosen.shares, [[5 / 7, 2 / 7], [0.5, 0.5]], rtol=1e-6)
    assert route(logits.astype(jnp.bfloat16), per_token=2, softmax_over="all").shares.dtype == "f4"


def test_balance_by_hand():
    logits = jnp.log(jnp.asarray([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]]))
    chosen = route(logits, per_token=1, softmax_over="all")
    both = load(logits, chosen, jnp.asarray([True, True, False]))
    np.testing.assert_allclose(both.chosen, [1, 1, 0])
    np.testing.assert_allclose(both.probability, [0.8, 0.8, 0.4], rtol=1e-6)
    assert both.tokens == 2
    assert math.isclose(balance(both), 3 * (0.5 * 0.4 + 0.5 * 0.4), rel_tol=1e-6)
    even = Load(jnp.full(4, 6.0), jnp.full(4, 3.0), jnp.asarray(12.0))
    assert math.isclose(balance(even), 2.0, rel_tol=1e-6)  # two experts per token
    assert balance(Load(jnp.zeros(4), jnp.zeros(4), jnp.zeros(()))) == 0
