"""Steps of adapters: the guards of a step hold for them too, beside plain and quantised bases."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import SPEC, Batch, assert_bytes, one_per_row

from jaxtune.model import decoder
from jaxtune.model.lora import Lora
from jaxtune.model.quantise import quantise
from jaxtune.parallel.mesh import make_mesh, put_batch
from jaxtune.spec import ModelSpec, MoeSpec
from jaxtune.training import program, schedules
from jaxtune.training.optim import optim
from jaxtune.training.state import TrainState
from jaxtune.training.step import StepMetrics
from jaxtune.tree import named, unnamed

WIDE = replace(SPEC, width=64)  # whole blocks of nf4
EXPERTS = replace(
    WIDE,
    stacks=tuple(
        replace(
            stack,
            pattern=tuple(
                replace(layer, moe=MoeSpec(experts=4, per_token=2), mlp_width=72)
                for layer in stack.pattern
            ),
        )
        for stack in WIDE.stacks
    ),
)
DORA = Lora(r=3, alpha=6.0, dora=True, dropout=0.1, tokens=(5, 63))
EIGHT = {"fsdp": 2, "tensor": 4}
INPUTS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}


def params_of(lora: Lora, spec: ModelSpec = WIDE) -> Any:
    """The same random weights for every test, the kernels as `lora.base` says."""
    params = named(decoder.init(spec, jax.random.key(0), jnp.float32))
    if lora.base != "none":
        for name in (*decoder.projections(spec), *decoder.banks(spec)):
            inputs = INPUTS[name.rpartition("/")[2]]
            smaller = functools.partial(
                quantise, kind=lora.base, inputs=inputs, double=lora.double_quant
            )
            if name in decoder.banks(spec):
                smaller = jax.vmap(smaller)
            for leaf, values in jax.vmap(smaller)(params.pop(f"{name}/kernel")).items():
                params[f"{name}/kernel/{leaf}"] = values
    return unnamed(params)


def trained_adapters(lora: Lora, params: Any, key: jax.Array, spec: ModelSpec = WIDE) -> Any:
    """As after some steps: adapters begin with zeros, which keep gradients from half of them."""

    def moved(leaf: jax.Array, name: str) -> jax.Array:
        of_leaf = jax.random.fold_in(key, sum(name.encode()))
        return leaf + 0.1 * jax.random.normal(of_leaf, leaf.shape, leaf.dtype)

    fresh = named(decoder.init_adapters(spec, lora, params, key))
    return unnamed({name: moved(leaf, name) for name, leaf in fresh.items()})


def run(
    lora: Lora,
    *,
    spec: ModelSpec = WIDE,
    sizes: dict[str, int] | None = None,
    microbatches: int = 2,
    lr: float = 0.02,
    remat: str = "full",
    dtype: Any = jnp.float32,
) -> tuple[TrainState, TrainState, StepMetrics]:
    """(state before, as numpy; state after one step; metrics of that step)."""
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1, **(sizes or {})}
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    built = program.build(
        spec,
        mesh,
        program.StepConfig(
            hyper=optim.Hyper(),
            lora=lora,
            seed=3,
            microbatches=microbatches,
            learning_rate=schedules.schedule(
                "constant", learning_rate=lr, warmup_steps=0, total_steps=9
            ),
            max_grad_norm=0.0,
            dtype=dtype,
            param_dtype=dtype,
            remat=remat,
        ),
    )
    batch = one_per_row()
    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda leaf, shape, where: jax.device_put(leaf.astype(shape.dtype), where),
            params_of(lora, spec), built.variables["params"], built.placed["params"],
        )  # fmt: skip
        make = jax.jit(
            functools.partial(trained_adapters, lora, spec=spec), out_shardings=built.placed["lora"]
        )
        variables = {"params": params, "lora": make(params, jax.random.key(1))}
        state, frozen = built.first_state(variables)
        before = jax.device_get(state)
        rows = put_batch(
            lambda lo, hi: Batch(*(x[lo:hi] for x in batch)),
            batch_size=batch.inputs.shape[0], length=batch.inputs.shape[1], mesh=mesh,
        )  # fmt: skip
        state, metrics = built.train_step(state, frozen, rows)
    return before, state, metrics


def assert_same(a: TrainState, b: TrainState) -> None:
    """The gradients to 1e-5, or to that of the largest of a leaf: the order of sums differs."""
    for name, value in named(a.opt_state[0].mu).items():
        expected = np.asarray(named(b.opt_state[0].mu)[name])
        limit = 1e-5 * float(np.abs(expected).max())
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=limit, err_msg=name)


@pytest.fixture(scope="module")
def reference() -> tuple[TrainState, TrainState, StepMetrics]:
    return run(DORA)


def test_eight_devices_equal_one_dropout_included(reference: Any) -> None:
    _, after, metrics = run(DORA, sizes={"fsdp": 4, "tensor": 2})
    assert float(metrics.loss) == pytest.approx(float(reference[2].loss), abs=1e-5)
    assert_same(reference[1], after)
    assert all(name.startswith("lora/") for name in named(after.trained))
    gate = after.trained["lora"]["stack_0"]["layer_0"]["mlp"]["gate"]
    assert gate["a"].addressable_shards[0].data.size * 4 == gate["a"].size
    assert gate["b"].addressable_shards[0].data.size * 2 == gate["b"].size


def test_every_adapter_learns(reference: Any) -> None:
    before, after, _ = reference
    for name, leaf in named(after.trained).items():
        assert (np.asarray(leaf) != named(before.trained)[name]).any(), name


def test_microbatches_remat_and_learning_rate_zero_change_nothing() -> None:
    lora = replace(DORA, dropout=0.0)
    before, one, metrics = run(lora, microbatches=1, remat="none", lr=0.0)
    _, two, _ = run(lora, microbatches=2, lr=0.0)
    assert_same(one, two)
    assert float(metrics.grad_norm) > 0
    assert_bytes(before.trained, one.trained)
    assert_bytes(before.trained, two.trained)


@pytest.fixture(scope="module")
def plain() -> StepMetrics:
    return run(Lora(r=3, alpha=6.0), sizes=EIGHT, dtype=jnp.bfloat16)[2]


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_step_beside_a_quantised_base(base: str, plain: StepMetrics) -> None:
    """On eight devices; the loss is within 2% of the one beside the base as it was."""
    lora = Lora(r=3, alpha=6.0, base=base, double_quant=base == "nf4")
    _, after, metrics = run(lora, sizes=EIGHT, dtype=jnp.bfloat16)
    assert float(metrics.loss) == pytest.approx(float(plain.loss), rel=0.02)
    assert float(metrics.loss) != float(plain.loss)
    assert named(after.trained).keys() == {f"lora/{n}" for n in _leaf_names(lora)}


@pytest.mark.slow
def test_a_step_beside_quantised_experts() -> None:
    """One device and eight agree; the loss is within 2% of the one beside the base as it was."""
    lora = Lora(r=3, alpha=6.0, base="nf4", double_quant=True)
    _, one, metrics = run(lora, spec=EXPERTS)
    for sizes in ({"fsdp": 2, "tensor": 2, "data": 2}, {"fsdp": 2, "tensor": 2, "expert": 2}):
        _, eight, there = run(lora, spec=EXPERTS, sizes=sizes)
        assert float(there.loss) == pytest.approx(float(metrics.loss), abs=1e-5)
        assert_same(one, eight)
    plain = run(replace(lora, base="none", double_quant=False), spec=EXPERTS)[2]
    assert float(metrics.loss) == pytest.approx(float(plain.loss), rel=0.02)
    assert float(metrics.loss) != float(plain.loss)


def _leaf_names(lora: Lora) -> set[str]:
    return set(named(decoder.abstract_adapters(WIDE, lora)))


def test_the_backward_pass_keeps_codes_and_not_kernels() -> None:
    """Without rematerialisation of layers: what is saved for a quantised kernel is its codes."""
    lora = Lora(r=2, alpha=4.0, base="nf4")
    variables = {
        "params": decoder.abstract(WIDE, jnp.float32, lora),
        "lora": decoder.abstract_adapters(WIDE, lora),
    }
    ids = jnp.zeros((2, 8), jnp.int32)

    def loss(adapters: Any, params: Any) -> jax.Array:
        output = decoder.forward(
            WIDE,
            {"params": params, "lora": adapters},
            decoder.TokenRows(ids, ids + 1, ids),
            decoder.ForwardConfig(jnp.float32, "none", lora=lora),
        )
        return jnp.sum(output.hidden)

    _, backward = jax.eval_shape(
        lambda a, p: jax.vjp(lambda a: loss(a, p), a), variables["lora"], variables["params"]
    )
    saved = [leaf for leaf in jax.tree.leaves(backward) if leaf.dtype == jnp.float32]
    down = (2, 32, 64)  # [L F D]
    assert down not in {leaf.shape for leaf in saved}
    assert jnp.dtype("uint4") in {leaf.dtype for leaf in jax.tree.leaves(backward)}
