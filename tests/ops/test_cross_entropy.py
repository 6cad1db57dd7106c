import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.test_util import check_grads

from jaxtune import mesh
from jaxtune.ops import cross_entropy
from jaxtune.ops.cross_entropy import Head, Sums

B, T, D, V = 2, 7, 6, 19
CHUNKS = [None, 1, 3, 7, 50]  # one chunk, one position each, a ragged last one, exact, too long


def batch(seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """hidden [B T D], head [D V], targets [B T], weights [B T] with zeros and fractions."""
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    weights = jnp.asarray(rng.choice([0.0, 0.0, 0.5, 1.0, 2.0], (B, T)), jnp.float32)
    return hidden, head, targets, weights


def linear_cross_entropy(hidden, kernel, targets, weights, *, chunk=None, **head) -> Sums:  # type: ignore[no-untyped-def]
    head = Head(kernel, **head)
    return cross_entropy.linear_cross_entropy(hidden, head, targets, weights, chunk=chunk)


def mean_loss(hidden, head, targets, weights, **options):  # type: ignore[no-untyped-def]
    sums = linear_cross_entropy(hidden, head, targets, weights, **options)
    return sums.loss / sums.weight


@pytest.mark.parametrize("chunk", CHUNKS)
def test_uniform_guesses_cost_log_v(chunk: int | None) -> None:
    hidden, head, targets, weights = batch()
    sums = linear_cross_entropy(hidden * 0, head, targets, weights, chunk=chunk)
    assert sums.weight == jnp.sum(weights)
    assert float(sums.loss) == pytest.approx(float(jnp.sum(weights)) * math.log(V), rel=1e-6)


def test_two_tokens_by_hand() -> None:
    """Logits (0, log 3): probabilities 1/4 and 3/4."""
    hidden = jnp.array([[[1.0], [1.0]]])
    head = jnp.array([[0.0, math.log(3)]])
    sums = linear_cross_entropy(hidden, head, jnp.array([[0, 1]]), jnp.array([[1.0, 2.0]]))
    assert float(sums.loss) == pytest.approx(math.log(4) + 2 * math.log(4 / 3), rel=1e-6)
    assert float(sums.weight) == 3.0
    assert float(sums.correct) == 2.0  # only the second, which weighs 2


@pytest.mark.torch
@pytest.mark.parametrize("chunk", CHUNKS)
def test_equals_torch(chunk: int | None) -> None:
    torch = pytest.importorskip("torch")
    arrays = batch()
    hidden, head = (torch.tensor(np.asarray(x), requires_grad=True) for x in arrays[:2])
    targets, weights = (torch.tensor(np.asarray(x)) for x in arrays[2:])
    losses = torch.nn.functional.cross_entropy(
        (hidden @ head).reshape(-1, V), targets.reshape(-1).long(), reduction="none"
    )
    theirs = (losses * weights.reshape(-1)).sum() / weights.sum()
    theirs.backward()
    ours, (d_hidden, d_head) = jax.value_and_grad(mean_loss, (0, 1))(*arrays, chunk=chunk)
    assert float(ours) == pytest.approx(float(theirs.detach()), rel=1e-6)
    np.testing.assert_allclose(d_hidden, hidden.grad, atol=1e-6)
    np.testing.assert_allclose(d_head, head.grad, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("chunk", [None, 3])
def test_gradients_are_the_slopes(chunk: int | None, softcap: float | None) -> None:
    hidden, head, targets, weights = batch()

    def f(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return mean_loss(hidden, head, targets, weights, chunk=chunk, softcap=softcap)

    # Central differences in f32: two digits.
    check_grads(f, (hidden, head), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_logits_are_scaled_then_bounded() -> None:
    hidden, head, targets, weights = batch()
    capped = linear_cross_entropy(hidden, head, targets, weights, scale=0.25, softcap=0.5)
    logits = 0.5 * np.tanh(np.asarray(hidden @ head, np.float64) / 4 / 0.5)
    np.testing.assert_allclose(
        cross_entropy.logits(hidden, Head(head, scale=0.25, softcap=0.5)), logits, atol=1e-6
    )
    losses = (
        np.log(np.exp(logits).sum(-1))
        - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    )
    assert float(capped.loss) == pytest.approx(float((losses * weights).sum()), rel=1e-5)


@pytest.mark.parametrize("chunk", [None, 3])
def test_nothing_to_train_is_zero_and_finite(chunk: int | None) -> None:
    hidden, head, targets, weights = batch()

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return linear_cross_entropy(hidden, head, targets, weights * 0, chunk=chunk).loss

    value, gradients = jax.value_and_grad(loss, (0, 1))(hidden, head)
    assert value == 0
    assert all(np.all(np.asarray(gradient) == 0) for gradient in gradients)


@pytest.mark.parametrize("chunk", [None, 3])
def test_targets_of_weight_zero_may_be_anything(chunk: int | None) -> None:
    hidden, head, targets, weights = batch()
    others = jnp.where(weights == 0, V - 1 - targets, targets)
    assert not np.array_equal(others, targets)
    ours = linear_cross_entropy(hidden, head, targets, weights, chunk=chunk)
    theirs = linear_cross_entropy(hidden, head, others, weights, chunk=chunk)
    assert ours == theirs


@pytest.mark.parametrize("chunk", [None, 3])
def test_correct_counts_the_lowest_best_guess(chunk: int | None) -> None:
    hidden, head, targets, weights = batch()
    sums = linear_cross_entropy(hidden, head, targets, weights, chunk=chunk)
    best = np.argmax(np.asarray(hidden @ head), -1)
    assert float(sums.correct) == float(np.sum(weights * (best == targets)))
    tied = linear_cross_entropy(hidden * 0, head, targets * 0, weights, chunk=chunk)
    assert tied.correct == tied.weight
    tied = linear_cross_entropy(hidden * 0, head, targets * 0 + 1, weights, chunk=chunk)
    assert tied.correct == 0


def test_halves_add_up_to_the_whole() -> None:
    hidden, head, targets, weights = batch()
    whole = linear_cross_entropy(hidden, head, targets, weights)
    parts = [
        linear_cross_entropy(hidden[b : b + 1], head, targets[b : b + 1], weights[b : b + 1])
        for b in range(B)
    ]
    for total, *pieces in zip(whole, *parts, strict=True):
        assert float(total) == pytest.approx(float(sum(pieces)), rel=1e-6)


def test_half_precision_sums_the_head_gradient_in_f32() -> None:
    """Eight chunks of 514 equal halves: 257 has nine bits, and bfloat16 holds eight."""
    rows, chunk = 8 * 514, 514
    hidden = jnp.ones((1, rows, 1), jnp.bfloat16)
    head = jnp.zeros((1, 2), jnp.float32)
    targets, weights = jnp.zeros((1, rows), jnp.int32), jnp.ones((1, rows))

    def loss(head: jax.Array) -> jax.Array:
        return linear_cross_entropy(hidden, head, targets, weights, chunk=chunk).loss

    gradient = jax.grad(loss)(head)
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, [[-rows / 2, rows / 2]], rtol=1e-6)


def test_logits_of_all_tokens_never_exist(largest_array: Callable[..., int]) -> None:
    rows, length, width, vocab = 2, 64, 4, 128
    hidden, head = jnp.ones((rows, length, width)), jnp.ones((width, vocab))
    targets, weights = jnp.zeros((rows, length), jnp.int32), jnp.ones((rows, length))

    def largest(chunk: int | None) -> int:
        def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
            return linear_cross_entropy(hidden, head, targets, weights, chunk=chunk).loss

        return largest_array(jax.grad(loss, (0, 1)), hidden, head)

    assert largest(chunk=8) == rows * 8 * vocab
    assert largest(chunk=length) == rows * length * vocab


def test_default_chunks_are_few_and_not_short(
    largest_array: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows_at_once(length: int) -> int:
        hidden, head = jnp.ones((1, length, 1)), jnp.ones((1, 64))
        targets, weights = jnp.zeros((1, length), jnp.int32), jnp.ones((1, length))
        return (
            largest_array(lambda *x: linear_cross_entropy(*x), hidden, head, targets, weights) // 64
        )

    assert rows_at_once(2048) == 2048  # small logits: one chunk
    monkeypatch.setattr(cross_entropy, "SMALL_LOGITS", 0)
    assert rows_at_once(200) == 200
    assert rows_at_once(2048) == 256
    assert rows_at_once(8192) == 512


@pytest.mark.parametrize("chunk", [None, 4])
def test_rows_and_vocabulary_spread_over_devices(chunk: int | None) -> None:
    rng = np.random.default_rng(0)
    rows, length, vocab = 4, 8, 32
    hidden = jnp.asarray(rng.normal(size=(rows, length, D)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(D, vocab)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (rows, length)), jnp.int32)
    weights = jnp.asarray(rng.choice([0.0, 1.0], (rows, length)), jnp.float32)

    def loss(hidden, head, targets, weights):  # type: ignore[no-untyped-def]
        return mean_loss(hidden, head, targets, weights, chunk=chunk)

    alone = jax.value_and_grad(loss, (0, 1))(hidden, head, targets, weights)
    devices = mesh.make_mesh({"data": 1, "fsdp": 4, "tensor": 2, "context": 1})
    axes = (("batch", "length", "act_embed"), (None, "vocab"), *[("batch", "length")] * 2)
    spread = [
        jax.device_put(x, NamedSharding(devices, mesh.partition_spec(names, x.shape, devices)))
        for x, names in zip((hidden, head, targets, weights), axes, strict=True)
    ]
    together = jax.jit(jax.value_and_grad(loss, (0, 1)))(*spread)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), together, alone)
