import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxtune.ops import cross_entropy, loss_plan
from jaxtune.ops.cross_entropy import Sums, cross_entropy_reference
from jaxtune.ops.head import Head, logits
from jaxtune.parallel import mesh

B, T, D, V = 2, 7, 6, 19
BLOCKS = [None, 5, 50]  # all at once, a last one that overlaps, more than there are
TINY_CHUNKS = {"SMALL_LOGITS": 0, "NARROW_CHUNK": 4}  # 14 tokens in 3 chunks of 5, one filler


def batch(seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """hidden [B T D], head [D V], targets [B T], weights [B T] with zeros and fractions."""
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    weights = jnp.asarray(rng.choice([0.0, 0.0, 0.5, 1.0, 2.0], (B, T)), jnp.float32)
    return hidden, head, targets, weights


@pytest.fixture(params=[False, True], ids=["one_chunk", "chunks"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether tokens are brought together and cut into chunks, as long batches are."""
    if request.param:
        for name, value in TINY_CHUNKS.items():
            monkeypatch.setattr(loss_plan, name, value)
    return request.param


def linear_cross_entropy(  # type: ignore[no-untyped-def]
    hidden,
    kernel,
    targets,
    weights,
    *,
    block=None,
    z_loss=0.0,
    loss_type="nll",
    compact=True,
    **head,
) -> Sums:
    @jax.jit  # one program in place of one for each operation
    def run(hidden, kernel, targets, weights):  # type: ignore[no-untyped-def]
        return cross_entropy.linear_cross_entropy(
            hidden,
            Head(kernel, **head),
            targets,
            weights,
            block=block,
            z_loss=z_loss,
            loss_type=loss_type,
            compact=compact,
        )

    return run(hidden, kernel, targets, weights)


def reference(  # type: ignore[no-untyped-def]
    hidden, kernel, targets, weights, *, z_loss=0.0, loss_type="nll", **head
) -> Sums:
    arrays = Head(kernel.astype(jnp.float32), **head), targets, weights
    hidden = hidden.astype(jnp.float32)
    return cross_entropy_reference(hidden, *arrays, z_loss=z_loss, loss_type=loss_type)


def mean_loss(hidden, head, targets, weights, **options):  # type: ignore[no-untyped-def]
    sums = linear_cross_entropy(hidden, head, targets, weights, **options)
    return sums.loss / sums.weight


@pytest.mark.parametrize("block", BLOCKS)
def test_uniform_guesses_cost_log_v(block: int | None) -> None:
    hidden, head, targets, weights = batch()
    sums = linear_cross_entropy(hidden * 0, head, targets, weights, block=block)
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


@pytest.mark.parametrize("block", [None, 1])
def test_two_tokens_of_dynamic_fine_tuning_by_hand(block: int | None) -> None:
    """-p log p, and the slope of -log p times p: p itself is a constant."""
    hidden = jnp.array([[[1.0], [1.0]]])
    head = jnp.array([[0.0, math.log(3)]])
    targets, weights = jnp.array([[0, 1]]), jnp.array([[1.0, 2.0]])

    def loss(hidden, head):  # type: ignore[no-untyped-def]
        options = {"block": block, "loss_type": "dft"}
        sums = linear_cross_entropy(hidden, head, targets, weights, **options)
        return sums.loss, sums

    gradients, sums = jax.grad(loss, (0, 1), has_aux=True)(hidden, head)
    assert float(sums.loss) == pytest.approx(
        math.log(4) / 4 + 2 * 3 / 4 * math.log(4 / 3), rel=1e-6
    )
    assert float(sums.nll) == pytest.approx(math.log(4) + 2 * math.log(4 / 3), rel=1e-6)
    assert float(sums.weight) == 3.0  # of both kinds of loss
    d_logits = np.array([[0.25 * (0.25 - 1), 0.25 * 0.75], [1.5 * 0.25, 1.5 * (0.75 - 1)]])
    np.testing.assert_allclose(gradients[0][0, :, 0], d_logits @ np.asarray(head[0]), rtol=1e-6)
    np.testing.assert_allclose(gradients[1][0], d_logits.sum(0), rtol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("block", BLOCKS)
def test_equals_torch(block: int | None, chunked: bool) -> None:
    torch = pytest.importorskip("torch")
    arrays = batch()
    hidden, head = (torch.tensor(np.asarray(x), requires_grad=True) for x in arrays[:2])
    targets, weights = (torch.tensor(np.asarray(x)) for x in arrays[2:])
    losses = torch.nn.functional.cross_entropy(
        (hidden @ head).reshape(-1, V), targets.reshape(-1).long(), reduction="none"
    )
    theirs = (losses * weights.reshape(-1)).sum() / weights.sum()
    theirs.backward()
    ours, (d_hidden, d_head) = jax.value_and_grad(mean_loss, (0, 1))(*arrays, block=block)
    assert float(ours) == pytest.approx(float(theirs.detach()), rel=1e-6)
    np.testing.assert_allclose(d_hidden, hidden.grad, atol=1e-6)
    np.testing.assert_allclose(d_head, head.grad, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("block", [None, 5])
def test_gradients_are_the_slopes(block: int | None, softcap: float | None) -> None:
    hidden, head, targets, weights = batch()

    def f(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return mean_loss(hidden, head, targets, weights, block=block, softcap=softcap)

    # Central differences in f32: two digits.
    check_grads(f, (hidden, head), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_logits_are_scaled_then_bounded() -> None:
    hidden, head, targets, weights = batch()
    capped = linear_cross_entropy(hidden, head, targets, weights, scale=0.25, softcap=0.5)
    bounded = 0.5 * np.tanh(np.asarray(hidden @ head, np.float64) / 4 / 0.5)
    np.testing.assert_allclose(
        logits(hidden, Head(head, scale=0.25, softcap=0.5)), bounded, atol=1e-6
    )
    losses = (
        np.log(np.exp(bounded).sum(-1))
        - np.take_along_axis(bounded, np.asarray(targets)[..., None], -1)[..., 0]
    )
    assert float(capped.loss) == pytest.approx(float((losses * weights).sum()), rel=1e-5)


@pytest.mark.parametrize("block", [None, 5])
def test_nothing_to_train_is_zero_and_finite(block: int | None, chunked: bool) -> None:
    hidden, head, targets, weights = batch()

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return linear_cross_entropy(hidden, head, targets, weights * 0, block=block).loss

    value, gradients = jax.value_and_grad(loss, (0, 1))(hidden, head)
    assert value == 0
    assert all(np.all(np.asarray(gradient) == 0) for gradient in gradients)


@pytest.mark.parametrize("block", [None, 5])
def test_targets_of_weight_zero_may_be_anything(block: int | None, chunked: bool) -> None:
    hidden, head, targets, weights = batch()
    others = jnp.where(weights == 0, V - 1 - targets, targets)
    assert not np.array_equal(others, targets)
    ours = linear_cross_entropy(hidden, head, targets, weights, block=block)
    theirs = linear_cross_entropy(hidden, head, others, weights, block=block)
    assert ours == theirs


@pytest.mark.parametrize("block", [None, 5])
def test_correct_counts_the_lowest_best_guess(block: int | None, chunked: bool) -> None:
    hidden, head, targets, weights = batch()
    sums = linear_cross_entropy(hidden, head, targets, weights, block=block)
    best = np.argmax(np.asarray(hidden @ head), -1)
    assert float(sums.correct) == float(np.sum(weights * (best == targets)))
    tied = linear_cross_entropy(hidden * 0, head, targets * 0, weights, block=block)
    assert tied.correct == tied.weight
    tied = linear_cross_entropy(hidden * 0, head, targets * 0 + 1, weights, block=block)
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


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize(
    ("block", "shards", "z_loss", "loss_type"),
    [
        (None, 1, 0.0, "nll"),
        (None, 1, 0.1, "nll"),
        (5, 1, 0.1, "nll"),
        (None, 2, 0.0, "nll"),
        (4, 2, 0.1, "nll"),
        (7, 3, 0.0, "nll"),
        (None, 1, 0.0, "dft"),
        (4, 2, 0.1, "dft"),
    ],
)
def test_equals_the_definition(
    block: int | None, shards: int, z_loss: float, loss_type: str, by_token: bool, chunked: bool
) -> None:
    """Scale, softcap and z-loss, a vocabulary in ranges, a table: values, hits, gradients."""
    hidden, kernel, targets, weights = batch()
    kernel = kernel[:, : V - V % shards]
    targets = jnp.minimum(targets, kernel.shape[1] - 1)
    numbers = {"z_loss": z_loss, "loss_type": loss_type, "scale": 0.7, "softcap": 1.5}

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.value_and_grad, argnums=(1, 2), has_aux=True)
    def ours(compact, hidden, kernel):  # type: ignore[no-untyped-def]
        stored = kernel.T if by_token else kernel
        cut = {"block": block, "shards": shards, "by_token": by_token, "compact": compact}
        sums = linear_cross_entropy(hidden, stored, targets, weights, **numbers, **cut)
        return 3.0 * (sums.loss + sums.auxiliary), sums

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def theirs(hidden, kernel):  # type: ignore[no-untyped-def]
        sums = reference(hidden, kernel, targets, weights, **numbers)
        return 3.0 * (sums.loss + sums.auxiliary), sums

    (value, sums), gradients = ours(True, hidden, kernel)
    (expected, defined), slopes = theirs(hidden, kernel)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    assert sums.correct == defined.correct
    assert float(sums.loss) == pytest.approx(float(defined.loss), rel=1e-6)
    assert float(sums.nll) == pytest.approx(float(defined.nll), rel=1e-6)
    # Sums over 19 entries and 14 tokens in another order, of gradients up to 12.
    for mine, slope in zip(gradients, slopes, strict=True):
        np.testing.assert_allclose(mine, slope, atol=1e-5)
    (in_place, _), unmoved = ours(False, hidden, kernel)
    assert float(in_place) == pytest.approx(float(expected), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), unmoved, gradients)


@pytest.mark.parametrize("block", [None, 5])
def test_half_precision_is_rounded_only_where_it_is_multiplied(
    block: int | None, chunked: bool
) -> None:
    hidden, kernel, targets, weights = batch()
    rounded = hidden.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)

    def ours(hidden, kernel):  # type: ignore[no-untyped-def]
        return linear_cross_entropy(hidden, kernel, targets, weights, block=block).loss

    def theirs(hidden, kernel):  # type: ignore[no-untyped-def]
        return reference(hidden, kernel, targets, weights).loss

    value, (d_hidden, d_kernel) = jax.value_and_grad(ours, (0, 1))(rounded[0], kernel)
    exact = [x.astype(jnp.float32) for x in rounded]
    expected, slopes = jax.value_and_grad(theirs, (0, 1))(*exact)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    assert (d_hidden.dtype, d_kernel.dtype) == (jnp.bfloat16, jnp.float32)
    # The gradient of logits, at most 2, is rounded to 8 bits before either product.
    np.testing.assert_allclose(d_hidden.astype(jnp.float32), slopes[0], atol=0.03)
    np.testing.assert_allclose(d_kernel, slopes[1], atol=0.03)


def test_half_precision_sums_the_head_gradient_in_f32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight chunks of 514 equal halves: 257 has nine bits, and bfloat16 holds eight."""
    rows, chunk = 8 * 514, 514
    monkeypatch.setattr(loss_plan, "SMALL_LOGITS", 0)
    monkeypatch.setattr(loss_plan, "NARROW_CHUNK", chunk)
    hidden = jnp.ones((1, rows, 1), jnp.bfloat16)
    head = jnp.zeros((1, 2), jnp.float32)
    targets, weights = jnp.zeros((1, rows), jnp.int32), jnp.ones((1, rows))

    def loss(head: jax.Array) -> jax.Array:
        return linear_cross_entropy(hidden, head, targets, weights).loss

    gradient = jax.grad(loss)(head)
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, [[-rows / 2, rows / 2]], rtol=1e-6)


def test_logits_of_the_whole_vocabulary_never_exist(largest_array: Callable[..., int]) -> None:
    rows, length, width, vocab = 2, 64, 4, 128
    hidden, head = jnp.ones((rows, length, width)), jnp.ones((width, vocab))
    targets, weights = jnp.zeros((rows, length), jnp.int32), jnp.ones((rows, length))

    def largest(block: int | None) -> int:
        def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
            return linear_cross_entropy(hidden, head, targets, weights, block=block).loss

        return largest_array(jax.grad(loss, (0, 1)), hidden, head)

    assert largest(block=32) == rows * length * 32
    assert largest(block=vocab) == rows * length * vocab


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize(("block", "products"), [(None, 3), (5, 4)])
def test_a_whole_kernel_is_multiplied_three_times(
    block: int | None, products: int, loss_type: str
) -> None:
    hidden, kernel, targets, weights = batch()

    def loss(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        options = {"block": block, "loss_type": loss_type}
        return linear_cross_entropy(hidden, kernel, targets, weights, **options).loss

    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, kernel))
    assert text.count("dot_general[") == products


def test_a_chunk_with_all_of_the_vocabulary_is_kept_small() -> None:
    plan = loss_plan.plan_loss(8192, 1024, 151936)
    assert plan.whole_kernel
    assert plan.chunk % loss_plan.LANES == 0
    assert plan.chunk * 151936 <= loss_plan.WHOLE_LOGITS
    assert plan.chunk * plan.chunks >= 8192
    assert not loss_plan.plan_loss(8192, 4096, 128256).whole_kernel, "the kernel is too large"
    assert not loss_plan.plan_loss(8192, 1024, 151936, compact=False).whole_kernel, "all tokens are"


@pytest.mark.parametrize(
    ("vocab", "wanted", "width"),
    [
        (128256, 16, 7552),  # 17 whole-tile blocks overlap by 128 entries; 16 would by 768
        (32768, 16, 2048),
        (151936, 19, 6912),
        (100, 3, 100),
    ],
)
def test_blocks_are_whole_tiles_that_overlap_little(vocab: int, wanted: int, width: int) -> None:
    blocks = -(-vocab // width)
    assert loss_plan._even_block(vocab, wanted) == width
    assert blocks * width - vocab < 0.01 * vocab


def test_chunks_without_a_weight_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not finite in a chunk that is read reaches every gradient of the head."""
    monkeypatch.setattr(loss_plan, "SMALL_LOGITS", 0)
    monkeypatch.setattr(loss_plan, "NARROW_CHUNK", 4)
    hidden = jnp.ones((2, 8, D)).at[0, 1::2].set(jnp.nan).at[1, 4:].set(jnp.nan)
    weights = jnp.zeros((2, 8)).at[0, 0::2].set(1.0).at[1, :4].set(0.5)
    head, targets = jnp.ones((D, V)), jnp.zeros((2, 8), jnp.int32)

    def loss(hidden, head, compact):  # type: ignore[no-untyped-def]
        return mean_loss(hidden, head, targets, weights, compact=compact)

    gradients = jax.grad(loss, (0, 1))(hidden, head, True)
    assert all(bool(jnp.all(jnp.isfinite(gradient))) for gradient in gradients)
    assert not jnp.all(jnp.isfinite(jax.grad(loss, 1)(hidden, head, False)))


def test_a_vocabulary_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="19 entries cannot be divided into 2 equal shards"):
        linear_cross_entropy(*batch(), shards=2)


# -- spread over devices -------------------------------------------------------------------------


def spread_batch() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    rows, length, width, vocab = 4, 8, 8, 32
    hidden = jnp.asarray(rng.normal(size=(rows, length, width)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(width, vocab)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (rows, length)), jnp.int32)
    weights = jnp.asarray(rng.choice([0.0, 1.0], (rows, length)), jnp.float32)
    return hidden, head, targets, weights


@pytest.mark.parametrize("block", [None, 10])
def test_rows_and_vocabulary_spread_automatically(block: int | None) -> None:
    arrays = spread_batch()

    def loss(hidden, head, targets, weights):  # type: ignore[no-untyped-def]
        return mean_loss(hidden, head, targets, weights, block=block, shards=2, compact=False)

    alone = jax.value_and_grad(loss, (0, 1))(*arrays)
    devices = mesh.make_mesh({"data": 1, "fsdp": 4, "tensor": 2, "context": 1})
    axes = (("batch", "length", "act_embed"), (None, "vocab"), *[("batch", "length")] * 2)
    spread = [
        jax.device_put(x, NamedSharding(devices, mesh.partition_spec(names, x.shape, devices)))
        for x, names in zip(arrays, axes, strict=True)
    ]
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*spread).compile()
    together = compiled(*spread)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), together, alone)
    assert "all-gather" not in compiled.as_text()


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize(("block", "tensor"), [(None, 1), (10, 1), (10, 2)])
def test_a_kernel_cut_along_its_width_is_gathered_by_blocks(
    block: int | None, tensor: int, by_token: bool, chunked: bool
) -> None:
    """A slice of D on each device of fsdp and rows of its own; V spread automatically."""
    hidden, kernel, targets, weights = spread_batch()
    weights = weights.at[1].set(0.0)  # one device has nothing to train
    stored, axis = (kernel.T, 1) if by_token else (kernel, 0)
    devices = Mesh(np.array(jax.devices()[: 4 * tensor]).reshape(4, tensor), ("fsdp", "tensor"))

    def sums_of(hidden, stored, targets, weights, **spread):  # type: ignore[no-untyped-def]
        cut = {"block": block, "by_token": by_token, "z_loss": 0.1 if block else 0.0}
        sums = linear_cross_entropy(hidden, stored, targets, weights, **cut, **spread)
        return sums.loss + sums.auxiliary

    spread = {
        "gather": lambda x: lax.all_gather(x, "fsdp", axis=axis, tiled=True),
        "scatter": lambda x: lax.psum_scatter(x, "fsdp", scatter_dimension=axis, tiled=True),
        "shards": tensor,
    }
    rows, width = P("fsdp"), P(*(["fsdp", None] if axis == 0 else [None, "fsdp"]))

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=devices,
        in_specs=(rows, width, rows, rows),
        out_specs=(P("fsdp"), (rows, width)),
        axis_names={"fsdp"},
        check_vma=False,
    )
    def one_device(*arrays):  # type: ignore[no-untyped-def]
        value, gradients = jax.value_and_grad(functools.partial(sums_of, **spread), (0, 1))(*arrays)
        return value[None], gradients

    vocab = P("tensor", "fsdp") if by_token else P("fsdp", "tensor")
    stored_apart = jax.device_put(stored, NamedSharding(devices, vocab))
    with jax.set_mesh(devices):
        values, gradients = one_device(hidden, stored_apart, targets, weights)
    expected, slopes = jax.value_and_grad(sums_of, (0, 1))(hidden, stored, targets, weights)
    assert float(jnp.sum(values)) == pytest.approx(float(expected), rel=1e-6)
    for mine, slope in zip(gradients, slopes, strict=True):
        # Numbers up to seven, summed over other blocks: some ten units in the last place.
        np.testing.assert_allclose(mine, slope, rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("block", BLOCKS)
def test_each_token_where_it_lies(block: int | None, chunked: bool) -> None:
    """Before they are added up: against the definition, the weightless ones 0."""
    hidden, head, targets, weights = batch()
    found = cross_entropy.token_losses(hidden, Head(head), targets, weights, block=block)
    logits = np.asarray(hidden @ head, np.float64)
    normaliser = np.log(np.exp(logits).sum(-1))
    losses = normaliser - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    counts = np.asarray(weights) != 0
    assert counts.any()
    assert not counts.all()
    np.testing.assert_allclose(found.loss, np.where(counts, losses, 0), rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(found.correct, counts & (logits.argmax(-1) == targets))
    sums = linear_cross_entropy(hidden, head, targets, weights, block=block)
    assert float(jnp.sum(weights * found.loss)) == pytest.approx(float(sums.loss), rel=1e-6)
