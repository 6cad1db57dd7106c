"""One suite for every implementation, against attention written as loops over single numbers."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxtune.ops import blocked as blocks
from jaxtune.ops.attention import IMPLEMENTATIONS, KERNELS, attend, choose
from jaxtune.ops.reference import AttentionMask, AttentionShape, AttentionSpec

B, T, H, G, K = 2, 11, 4, 2, 8
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0], [1] * T], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0], list(range(T))], np.int32)
SINKS = np.linspace(-1.0, 2.0, H).astype(np.float32)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": SINKS},
    "scale": {"scale": 1.0},
    "all": {"window": 2, "softcap": 1.5, "sinks": SINKS, "scale": 0.7},
}


@pytest.fixture(params=sorted(IMPLEMENTATIONS.keys() - KERNELS))  # those: test_kernels
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(blocks, "QUERY_BLOCK", 4)  # T = 11: three blocks, the last one ragged
    monkeypatch.setattr(blocks, "KEY_BLOCK", 3)
    return request.param


def qkv(seed: int = 0, S: int = T) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = ((B, T, H, K), (B, S, G, K), (B, S, G, K))
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return q, k, v


def pairs(segments: Any, positions: Any) -> AttentionMask:
    """Rows that see themselves."""
    return AttentionMask(*map(jnp.asarray, (segments, segments, positions, positions)))


MASK = pairs(SEGMENTS, POSITIONS)


def spec_of(case: dict[str, Any]) -> AttentionSpec:
    """The spec of a case, its sinks on the device."""
    case = {"scale": K**-0.5} | case
    return AttentionSpec(**{k: jnp.asarray(v) if k == "sinks" else v for k, v in case.items()})


PLAIN = spec_of({})


def by_loops(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    segments: tuple[np.ndarray, np.ndarray],
    positions: tuple[np.ndarray, np.ndarray],
    window: int | None = None,
    softcap: float | None = None,
    sinks: np.ndarray | None = None,
    scale: float | None = None,
) -> np.ndarray:
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(*q.shape[:3]):
        g = h // (q.shape[2] // k.shape[2])
        weights = {}
        for s in range(k.shape[1]):
            distance = positions[0][b, t] - positions[1][b, s]
            same = segments[0][b, t] == segments[1][b, s] != 0
            if not same or distance < 0 or (window is not None and distance >= window):
                continue
            score = float(q[b, t, h] @ k[b, s, g]) * (scale or K**-0.5)
            weights[s] = math.exp(softcap * math.tanh(score / softcap) if softcap else score)
        total = sum(weights.values()) + (0.0 if sinks is None else math.exp(sinks[h]))
        for s, weight in weights.items():
            out[b, t, h] += weight / total * v[b, s, g]
    return out


@pytest.mark.parametrize("case", CASES)
def test_values(impl: str, case: str) -> None:
    q, k, v = qkv()
    ours = attend(q, k, v, MASK, spec_of(CASES[case]), impl=impl)
    exact = by_loops(
        *(np.asarray(x, np.float64) for x in (q, k, v)),
        (SEGMENTS, SEGMENTS),
        (POSITIONS, POSITIONS),
        **CASES[case],
    )
    # f32 products of eight numbers of size one, a softmax: a few units in the last place.
    np.testing.assert_allclose(ours, exact, atol=2e-6)


def test_fewer_queries_than_keys(impl: str) -> None:
    """Decoding: the query's place is in its numbers, not in its index."""
    S = T + 5
    q, k, v = qkv(S=S)
    segments = np.ones((B, T), np.int32), np.ones((B, S), np.int32)
    positions = np.full((B, T), 6, np.int32), np.tile(np.arange(S, dtype=np.int32), (B, 1))
    mask = AttentionMask(*map(jnp.asarray, (*segments, *positions)))
    ours = attend(q, k, v, mask, PLAIN, impl=impl)
    exact = by_loops(*(np.asarray(x, np.float64) for x in (q, k, v)), segments, positions)
    np.testing.assert_allclose(ours, exact, atol=2e-6)


@pytest.mark.parametrize("case", ["plain", "all"])
def test_gradients_are_the_slopes(impl: str, case: str) -> None:
    options = {k: v for k, v in CASES[case].items() if k != "sinks"}

    def f(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array) -> jax.Array:
        return attend(q, k, v, MASK, spec_of(options | {"sinks": sinks}), impl=impl)

    # Central differences in f32 with steps of about 1e-2: two digits.
    check_grads(f, (*qkv(), jnp.asarray(SINKS)), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_reference(impl: str, case: str) -> None:

    def gradients(name: str) -> tuple[jax.Array, ...]:
        def f(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(attend(q, k, v, MASK, spec_of(CASES[case]), impl=name)))

        return jax.grad(f, (0, 1, 2))(*qkv())

    for ours, theirs in zip(gradients(impl), gradients("reference"), strict=True):
        # Numbers up to five, sums of five products in another order: ten units in the last place.
        np.testing.assert_allclose(ours, theirs, atol=2e-6, rtol=1.2e-6)


def test_who_sees_nothing_gives_zeros_and_finite_gradients(impl: str) -> None:
    q, k, v = qkv()

    def f(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v, MASK, PLAIN, impl=impl)

    out, pull = jax.vjp(f, q, k, v)
    padding = SEGMENTS == 0
    assert np.all(np.asarray(out)[padding] == 0)
    d_q, d_k, d_v = pull(jnp.ones_like(out))
    for gradient in (d_q, d_k, d_v):
        assert np.all(np.isfinite(gradient))
        assert np.all(np.asarray(gradient)[padding] == 0)


def test_a_neighbour_in_the_row_changes_not_one_bit(impl: str) -> None:
    q, k, v = qkv()
    first = SEGMENTS[0] == 1
    disturbed = [jnp.where(first[None, :, None, None], x, x * 3 + 1) for x in (q, k, v)]
    before = attend(q, k, v, MASK, PLAIN, impl=impl)
    after = attend(*disturbed, MASK, PLAIN, impl=impl)
    assert np.array_equal(before[0, first], after[0, first])
    assert not np.array_equal(before[0, ~first], after[0, ~first])


def test_half_precision_in_and_out_softmax_in_f32(impl: str) -> None:
    q, k, v = qkv()
    exact = attend(q, k, v, MASK, PLAIN, impl=impl)
    halves = (x.astype(jnp.bfloat16) for x in (q, k, v))
    ours = attend(*halves, MASK, PLAIN, impl=impl)
    assert ours.dtype == jnp.bfloat16
    # Rounding q, k, v and the weights to eight bits, values of size one.
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, atol=5e-2)


def test_gradients_of_half_precision_keys_are_summed_in_f32(
    impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One key seen by 1024 queries, a block each; bfloat16 sums of ones end at 256."""
    monkeypatch.setattr(blocks, "QUERY_BLOCK", 1)
    queries = 1024
    q, v = jnp.ones((1, queries, 1, 2), jnp.bfloat16), jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    ones = jnp.ones((1, queries), jnp.int32), jnp.ones((1, 1), jnp.int32)

    def f(v: jax.Array) -> jax.Array:
        out = attend(q, v * 0, v, AttentionMask(*ones, *ones), PLAIN, impl=impl)
        return jnp.sum(out, dtype=jnp.float32)

    np.testing.assert_array_equal(jax.grad(f)(v), np.full(v.shape, queries))


@pytest.mark.parametrize(("name", "holds"), [("reference", True), ("blocked", False)])
def test_blocked_never_holds_all_scores(
    name: str,
    holds: bool,
    monkeypatch: pytest.MonkeyPatch,
    largest_array: Callable[..., int],
) -> None:
    monkeypatch.setattr(blocks, "QUERY_BLOCK", 8)
    monkeypatch.setattr(blocks, "KEY_BLOCK", 8)
    rows = 128
    q, k = jnp.ones((1, rows, H, 4)), jnp.ones((1, rows, G, 4))
    places = jnp.ones((1, rows), jnp.int32), jnp.arange(rows, dtype=jnp.int32)[None]

    def f(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(attend(q, k, v, pairs(*places), PLAIN, impl=name))

    largest = largest_array(jax.grad(f, (0, 1, 2)), q, k, k)
    assert (largest >= rows * rows) == holds


def test_blocks_that_no_query_sees_are_not_visited() -> None:
    """Packed rows cost what their texts cost: the ranges of key blocks, by hand."""
    segments = jnp.asarray([[1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 0, 0, 0, 0]])
    positions = jnp.asarray([[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5, 0, 0, 0, 0]])
    blocks_of = segments.reshape(1, 4, 4), positions.reshape(1, 4, 4)
    first, stop = blocks.visited(pairs(*blocks_of), None)
    assert (first.tolist(), stop.tolist()) == ([[0, 1, 1, 0]], [[1, 2, 3, 0]])
    long = jnp.ones((1, 4, 4), jnp.int32), jnp.arange(16, dtype=jnp.int32).reshape(1, 4, 4)
    first, stop = blocks.visited(pairs(*long), 4)
    assert (first.tolist(), stop.tolist()) == ([[0, 0, 1, 2]], [[1, 2, 3, 4]])


def test_keys_in_any_order_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is skipped is decided by numbers, not by the place in the row."""
    monkeypatch.setattr(blocks, "QUERY_BLOCK", 4)
    monkeypatch.setattr(blocks, "KEY_BLOCK", 3)
    q, k, v = qkv()
    order = np.random.default_rng(3).permutation(T)
    mixed = AttentionMask(SEGMENTS, SEGMENTS[:, order], POSITIONS, POSITIONS[:, order])
    there = attend(q, k[:, order], v[:, order], mixed, PLAIN, impl="blocked")
    here = attend(q, k, v, MASK, PLAIN, impl="blocked")
    np.testing.assert_allclose(there, here, atol=2e-6)


def test_choice_by_length_with_its_reason() -> None:
    short, why_short = choose("cpu", AttentionShape(512, 512, (8,)))
    long, why_long = choose("cpu", AttentionShape(513, 513, (8,)))
    assert (short, long) == ("reference", "blocked")
    assert "512 queries" in why_short
    assert "513 queries" in why_long
    assert "not splash: it is for tpu, here is cpu" in why_long
    assert "not cudnn: it is for gpu, here is cpu" in why_long


def test_a_request_is_run_or_refused_with_the_reason() -> None:
    rows = AttentionShape(64, 64, (8,))
    assert choose("cpu", rows, "blocked") == ("blocked", "requested")
    with pytest.raises(ValueError, match="splash cannot be run: it is for tpu, here is cpu"):
        choose("cpu", rows, "splash")
    with pytest.raises(ValueError, match="no 'flash'; expected auto or one of blocked, cudnn"):
        choose("cpu", rows, "flash")
