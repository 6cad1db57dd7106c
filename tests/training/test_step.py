"""The four guards of a step (learning rate 0, microbatches, devices, packing), and its refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.model import decoder
from jaxtune.ops.cross_entropy import Sums
from jaxtune.ops.loss_plan import LossType
from jaxtune.parallel.mesh import make_mesh, put_batch
from jaxtune.spec import LayerSpec, ModelSpec, RopeSpec, Stack
from jaxtune.training import program, schedules
from jaxtune.training.optim import optim
from jaxtune.training.state import HOST, TrainState
from jaxtune.training.step import GradientConfig, StepMetrics, eval_step, gradient, train_step
from jaxtune.tree import named

LAYER = LayerSpec(
    heads=4, kv_heads=2, head_dim=8, mlp_width=32, rope=RopeSpec(theta=100.0), qkv_bias=True
)
SPEC = ModelSpec(
    vocab=64, width=16, stacks=(Stack((LAYER,), 2),), norm_eps=1e-6, tie_head=False,
    max_positions=128, init_scale=0.3,
)  # fmt: skip
ROWS, LENGTH = 16, 24


class Batch(NamedTuple):
    inputs: Any
    targets: Any
    weights: Any
    segment_ids: Any
    positions: Any


def lengths_and_trained() -> list[tuple[int, int]]:
    """Examples of very different trained-token counts, one with a fractional weight (below)."""
    rng = np.random.default_rng(5)
    lengths = [int(n) for n in rng.integers(2, LENGTH + 1, ROWS)]
    return [(n, 1 if i % 3 else n) for i, n in enumerate(lengths)]


def examples() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(6)
    made = []
    for i, (length, trained) in enumerate(lengths_and_trained()):
        ids = rng.integers(0, SPEC.vocab, length + 1)
        weights = np.zeros(length, np.float32)
        weights[length - trained :] = 0.25 if i == 4 else 1.0
        made.append((ids[:-1], ids[1:], weights))
    return made


def rows_of(packs: list[list[tuple[np.ndarray, ...]]], length: int) -> Batch:
    shape = (len(packs), length)
    batch = Batch(
        *(np.zeros(shape, dt) for dt in (np.int32, np.int32, np.float32, np.int32, np.int32))
    )
    for row, pack in enumerate(packs):
        at = 0
        for segment, (inputs, targets, weights) in enumerate(pack, start=1):
            span = (row, slice(at, at + len(inputs)))
            batch.inputs[span], batch.targets[span], batch.weights[span] = inputs, targets, weights
            batch.segment_ids[span] = segment
            batch.positions[span] = np.arange(len(inputs))
            at += len(inputs)
    return batch


def one_per_row() -> Batch:
    return rows_of([[example] for example in examples()], LENGTH)


def params_on(mesh: jax.sharding.Mesh, built: program.Program) -> Any:
    with jax.set_mesh(mesh):
        make = jax.jit(
            lambda key: decoder.init(SPEC, key, jnp.float32), out_shardings=built.placed["params"]
        )
        return make(jax.random.key(0))


def run(
    batch: Batch,
    *,
    sizes: dict[str, int] | None = None,
    microbatches: int = 1,
    lr: float = 0.1,
    steps: int = 1,
    poison: float | None = None,
    max_grad_norm: float = 1.0,
    remat: str = "full",
    is_trained: Callable[[str], bool] = lambda name: True,
    optim_offload: bool = False,
    loss_type: LossType = "nll",
) -> tuple[TrainState, TrainState, StepMetrics]:
    """(state before, as numpy; state after; metrics of the last step)."""
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1, **(sizes or {})}
    count = int(np.prod(list(sizes.values())))
    mesh = make_mesh(sizes, jax.devices()[:count])
    built = program.build(
        SPEC,
        mesh,
        program.StepConfig(
            hyper=optim.Hyper(weight_decay=0.1),
            learning_rate=schedules.schedule(
                "constant", learning_rate=lr, warmup_steps=0, total_steps=9
            ),
            max_grad_norm=max_grad_norm,
            microbatches=microbatches,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            remat=remat,
            is_trained=is_trained,
            optim_offload=optim_offload,
            loss_type=loss_type,
        ),
    )
    params = params_on(mesh, built)
    if poison is not None:
        params["final_norm"]["scale"] = params["final_norm"]["scale"] * poison
    with jax.set_mesh(mesh):
        state, frozen = built.first_state({"params": params})
        before = jax.device_get(state)
        for _ in range(steps):
            placed = put_batch(
                lambda lo, hi: Batch(*(x[lo:hi] for x in batch)),
                batch_size=batch.inputs.shape[0], length=batch.inputs.shape[1], mesh=mesh,
            )  # fmt: skip
            state, metrics = built.train_step(state, frozen, placed)
    return before, state, metrics


def assert_same(a: TrainState, b: TrainState, tolerance: float = 1e-5) -> None:
    """Parameters and moments. Adam's first steps amplify noise in tiny gradients, so the first
    moment (0.1 * gradient, clipped) is the sharp comparison; parameters move by at most lr."""
    moments = (named(a.opt_state[0].mu), named(b.opt_state[0].mu))
    for name, value in moments[0].items():
        np.testing.assert_allclose(value, moments[1][name], atol=tolerance * 0.1, err_msg=name)


def assert_bytes(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def reference() -> tuple[TrainState, TrainState, StepMetrics]:
    return run(one_per_row(), max_grad_norm=0.0)


def token_nll(state: TrainState, batch: Batch) -> np.ndarray:
    """[B T], from all logits at once."""
    logits = decoder.logits(
        SPEC, state.trained, batch.inputs,
        segment_ids=batch.segment_ids, positions=batch.positions, dtype=jnp.float32,
    )  # fmt: skip
    log_p = jax.nn.log_softmax(logits)
    return -np.take_along_axis(np.asarray(log_p), batch.targets[..., None], -1)[..., 0]


def test_the_loss_is_the_weighted_mean_over_everything(
    reference: tuple[TrainState, TrainState, StepMetrics],
) -> None:
    before, _, metrics = reference
    batch = one_per_row()
    ce = token_nll(before, batch)
    w = batch.weights.astype(np.float64)
    assert float(metrics.loss) == pytest.approx((w * ce).sum() / w.sum(), rel=1e-5)
    assert float(metrics.weight) == pytest.approx(w.sum())
    means = [(w[i] * ce[i]).sum() / w[i].sum() for i in range(ROWS)]
    assert abs(np.mean(means) - float(metrics.loss)) > 1e-3  # a mean of means would differ


def test_learning_rate_zero_leaves_every_byte() -> None:
    before, after, metrics = run(one_per_row(), lr=0.0, steps=2)
    assert_bytes(before.trained, after.trained)
    assert float(metrics.grad_norm) > 0
    assert int(after.step) == 2


def test_a_negative_zero_survives_learning_rate_zero() -> None:
    before, after, _ = run(one_per_row(), lr=0.0, poison=-0.0)
    assert np.signbit(before.trained["params"]["final_norm"]["scale"]).all()
    assert_bytes(before.trained, after.trained)


@pytest.mark.parametrize("microbatches", [2, 8, 16])
def test_microbatches_equal_one_batch(
    reference: tuple[TrainState, TrainState, StepMetrics], microbatches: int
) -> None:
    _, after, metrics = run(one_per_row(), microbatches=microbatches, max_grad_norm=0.0)
    assert float(metrics.loss) == pytest.approx(float(reference[2].loss), abs=1e-5)
    assert float(metrics.grad_norm) == pytest.approx(float(reference[2].grad_norm), rel=1e-5)
    assert_same(reference[1], after)


@pytest.mark.parametrize(
    ("sizes", "microbatches"),
    [
        ({"fsdp": 8}, 1),
        ({"fsdp": 4, "tensor": 2}, 2),
        ({"tensor": 8}, 1),  # more than heads: those are replicated, the mlp and vocab are not
        ({"data": 2, "fsdp": 2, "tensor": 2}, 1),
        ({"data": 8}, 2),
    ],
)
def test_eight_devices_equal_one(
    reference: tuple[TrainState, TrainState, StepMetrics],
    sizes: dict[str, int],
    microbatches: int,
) -> None:
    _, after, metrics = run(
        one_per_row(), sizes=sizes, microbatches=microbatches, max_grad_norm=0.0
    )
    assert float(metrics.loss) == pytest.approx(float(reference[2].loss), abs=1e-5)
    assert float(metrics.grad_norm) == pytest.approx(float(reference[2].grad_norm), rel=1e-5)
    assert_same(reference[1], after)
    kernel = after.trained["params"]["stack_0"]["layer_0"]["mlp"]["gate"]["kernel"]
    shards = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    assert kernel.addressable_shards[0].data.size * shards == kernel.size
    moment = after.opt_state[0].nu["params"]["stack_0"]["layer_0"]["mlp"]["gate"]["kernel"]
    assert moment.sharding == kernel.sharding


def test_moments_in_the_memory_of_the_host_change_nothing(
    reference: tuple[TrainState, TrainState, StepMetrics],
) -> None:
    options = {"sizes": {"fsdp": 4}, "max_grad_norm": 0.0, "optim_offload": True}
    _, after, metrics = run(one_per_row(), **options)
    assert float(metrics.loss) == pytest.approx(float(reference[2].loss), abs=1e-5)
    assert_same(reference[1], after)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(after.opt_state[0].mu)}
    assert kinds == {HOST}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(after.trained)} == {"device"}


def packed() -> Batch:
    """Three or more examples in a row, with a padded end."""
    packs: list[list[tuple[np.ndarray, ...]]] = [[]]
    for example in examples():
        if sum(len(e[0]) for e in packs[-1]) + len(example[0]) > 3 * LENGTH:
            packs.append([])
        packs[-1].append(example)
    assert max(map(len, packs)) >= 3
    return rows_of(packs + [[]] * (-len(packs) % 8), 3 * LENGTH)


def test_packed_equals_unpacked(reference: tuple[TrainState, TrainState, StepMetrics]) -> None:
    _, after, metrics = run(packed(), max_grad_norm=0.0)
    assert float(metrics.loss) == pytest.approx(float(reference[2].loss), abs=1e-5)
    assert float(metrics.grad_norm) == pytest.approx(float(reference[2].grad_norm), rel=1e-5)
    assert_same(reference[1], after)


def test_dynamic_fine_tuning_is_the_same_packed_in_microbatches_and_on_eight_devices() -> None:
    batch = one_per_row()
    options: Any = {"max_grad_norm": 0.0, "loss_type": "dft"}
    before, after, metrics = run(batch, **options)
    nll = token_nll(before, batch)
    w = batch.weights.astype(np.float64)
    assert float(metrics.loss) == pytest.approx((w * np.exp(-nll) * nll).sum() / w.sum(), rel=1e-5)
    assert float(metrics.nll) == pytest.approx((w * nll).sum() / w.sum(), rel=1e-5)
    split = run(packed(), sizes={"fsdp": 4, "tensor": 2}, microbatches=2, **options)
    for name in ("loss", "nll", "grad_norm"):
        assert float(getattr(split[2], name)) == pytest.approx(float(getattr(metrics, name)), 1e-5)
    assert_same(after, split[1])


@pytest.mark.parametrize("remat", ["none", "attention", "projections", "offload"])
def test_rematerialisation_changes_nothing(
    reference: tuple[TrainState, TrainState, StepMetrics], remat: str
) -> None:
    _, after, _ = run(one_per_row(), remat=remat, max_grad_norm=0.0)
    assert_same(reference[1], after)


def test_a_step_without_trained_tokens_changes_nothing() -> None:
    batch = one_per_row()
    before, after, metrics = run(batch._replace(weights=np.zeros_like(batch.weights)), steps=2)
    assert_bytes((before.trained, before.opt_state), (after.trained, after.opt_state))
    assert (float(metrics.loss), float(metrics.grad_norm), float(metrics.finite)) == (0, 0, 1)
    assert int(after.step) == 2


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_non_finite_step_reaches_no_parameter(poison: float) -> None:
    before, after, metrics = run(one_per_row(), poison=poison)
    assert float(metrics.finite) == 0.0
    assert_bytes((before.trained, before.opt_state), (after.trained, after.opt_state))


def test_small_steps_move_the_weights_of_an_f32_master() -> None:
    before, after, _ = run(one_per_row(), lr=1e-5, steps=20)
    moved = [
        np.mean(np.asarray(a) != b)
        for a, b in zip(
            jax.tree.leaves(after.trained), jax.tree.leaves(before.trained), strict=True
        )
    ]
    assert min(moved) > 0.9


def test_only_the_trained_part_has_gradients_moments_and_updates(
    reference: tuple[TrainState, TrainState, StepMetrics],
) -> None:
    """The frozen rest is another tree: the same loss, and the same gradients of what is trained."""

    def mlp(name: str) -> bool:
        return "/mlp/" in name

    whole, all_trained, metrics = reference
    before, after, part = run(one_per_row(), is_trained=mlp, max_grad_norm=0.0, microbatches=2)
    assert named(after.trained).keys() == {n for n in named(whole.trained) if mlp(n)}
    assert named(after.opt_state[0].mu).keys() == named(after.trained).keys()
    assert float(part.loss) == pytest.approx(float(metrics.loss), abs=1e-5)
    assert float(part.grad_norm) < float(metrics.grad_norm) * 0.99
    for name, moment in named(after.opt_state[0].mu).items():
        expected = named(all_trained.opt_state[0].mu)[name]
        np.testing.assert_allclose(moment, expected, atol=1e-6, err_msg=name)
        assert (np.asarray(named(after.trained)[name]) != named(before.trained)[name]).any()


def test_a_step_draws_by_seed_step_and_microbatch_alone() -> None:
    """What an objective is given: another key for each step and microbatch, the same after a
    resume, none in evaluation."""

    def objective(variables: Any, rows: Any, key: Any) -> Sums:
        drawn = jnp.float32(-1) if key is None else jax.random.uniform(key)
        return Sums(drawn, jnp.float32(1), jnp.float32(0))

    def loss(seed: int, step: int, microbatches: int = 1) -> float:
        _, sums = gradient(
            {}, {}, one_per_row(), jnp.int32(step), axes={}, shapes={},
            config=GradientConfig(objective, microbatches, seed, jnp.float32),
        )  # fmt: skip
        return float(sums.loss / sums.weight)

    assert loss(1, 7) == loss(1, 7)
    draws = [loss(1, 7), loss(1, 8), loss(2, 7), loss(1, 7, 2), loss(1, 7, 4)]
    assert len(set(draws)) == len(draws)
    assert float(eval_step({}, {}, one_per_row(), objective=objective).loss) == -1


def test_schedule_free_takes_its_gradient_between_average_and_fast_weights() -> None:
    """Of w^2 / 2 the gradient is the point itself: the second moment shows where it was taken."""

    def itself(point: Any, *_: Any) -> tuple[Any, Sums]:
        return point, Sums(jnp.float32(0), jnp.float32(1), jnp.float32(0))

    axes = {"w": {"kernel": ("embed", None)}}
    x, z = jnp.full((2, 2), 3.0), jnp.full((2, 2), -1.0)
    made = optim.optimiser(optim.Hyper("schedule_free", beta1=0.9, beta2=0.99), axes)
    begun = made.init({"w": {"kernel": x}})._replace(z={"w": {"kernel": z}})
    state, _ = train_step(
        TrainState(jnp.int32(0), {"w": {"kernel": x}}, begun), {}, one_per_row(),
        gradient=itself, optimiser=made, learning_rate=lambda step: jnp.float32(0.1),
        max_grad_norm=0.0,
    )  # fmt: skip
    y = 0.9 * 3.0 + 0.1 * -1.0
    np.testing.assert_allclose(state.opt_state.nu["w"]["kernel"], 0.01 * y**2, rtol=1e-5)
