"""The mixture against loops over tokens and experts, values and gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.ops.moe import IMPLEMENTATIONS, Chosen, Experts, Load, balance, load, mix, route

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


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("k", "biases", "clamp"),
    [(2, False, None), (3, True, (1.7, 1.5)), (1, True, None), (E, False, None)],
)
def test_mixture_is_that_of_the_loops(impl, k, biases, clamp):
    rng = np.random.default_rng(k)
    x, logits = (jnp.asarray(rng.normal(size=(N, n)), jnp.float32) for n in (D, E))
    chosen = route(logits, per_token=k, softmax_over="all")
    experts = _experts(k, biases=biases)
    got = jax.jit(lambda *a: mix(*a, activation=jax.nn.silu, clamp=clamp, impl=impl))(
        x, experts, chosen
    )
    np.testing.assert_allclose(got, _by_loops(x, experts, chosen, clamp), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("idle", [False, True])
def test_gradients_of_ragged_are_those_of_the_reference(idle):
    """Of tokens, router and all experts; also when all tokens choose the same two experts."""
    rng = np.random.default_rng(1)
    x, logits, probe = (jnp.asarray(rng.normal(size=(N, n)), jnp.float32) for n in (D, E, D))
    if idle:
        logits = logits + jnp.asarray([[0.0, 20.0, 0.0, 18.0, 0.0]])
    experts = _experts(1, biases=True)

    def loss(x, logits, experts, impl):
        chosen = route(logits, per_token=2, softmax_over="chosen")
        y = mix(x, experts, chosen, activation=jax.nn.silu, clamp=(1.7, 3.0), impl=impl)
        return jnp.sum(y * probe)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnames="impl")
    expected = gradient(x, logits, experts, impl="reference")
    found = gradient(x, logits, experts, impl="ragged")
    for want, got in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    assert (np.abs(found[2].gate).max(axis=(1, 2)) == 0).sum() == (3 if idle else 0)


def test_a_token_does_not_depend_on_the_others():
    rng = np.random.default_rng(2)
    x, logits = (jnp.asarray(rng.normal(size=(N, n)), jnp.float32) for n in (D, E))
    experts = _experts(2, biases=True)

    def run(x, logits):
        chosen = route(logits, per_token=2, softmax_over="all")
        return mix(x, experts, chosen, activation=jax.nn.silu, clamp=None)

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


def test_an_unknown_implementation_is_refused():
    chosen = route(jnp.zeros((N, E)), per_token=1, softmax_over="all")
    with pytest.raises(ValueError, match="mixture implementation is 'dense'; expected one of ragg"):
        mix(
            jnp.zeros((N, D)),
            _experts(0, biases=False),
            chosen,
            activation=jax.nn.silu,
            clamp=None,
            impl="dense",
        )
