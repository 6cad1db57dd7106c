"""A part of the parameters: which it is, that it trains exactly, and that the rest does nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import SPEC, Batch, one_per_row

from jaxtune.config import ConfigError
from jaxtune.model import decoder
from jaxtune.model.lora import Lora
from jaxtune.parallel.mesh import make_mesh, put_batch
from jaxtune.planning import hlo_cost
from jaxtune.spec import (
    LayerSpec,
    ModelSpec,
    MoeSpec,
    RopeSpec,
    Stack,
    attention_flops_per_token,
    flops_per_token,
    whole_backward,
)
from jaxtune.training import program
from jaxtune.training.optim import optim
from jaxtune.training.trainable import backward, share, trainable_subset
from jaxtune.tree import merge, named, split, unnamed

DEEP = replace(SPEC, stacks=(Stack(SPEC.stacks[0].pattern, 3),))


def test_the_last_layers_are_leaves_of_their_own_and_a_pattern_adds_to_them() -> None:
    last = trainable_subset(DEEP, trainable=None, train_last_layers=2)
    assert last is not None
    assert [stack.repeats for stack in last.spec.stacks] == [1, 2]
    everything = named(decoder.abstract(last.spec, jnp.float32))
    assert last.names == {name for name in everything if name.startswith("stack_1/")}
    more = trainable_subset(DEEP, trainable="^final_norm|stack_0/.*/mlp/", train_last_layers=2)
    assert more is not None
    added = {name for name in everything if name.startswith("stack_0/layer_0/mlp/")}
    assert more.names == last.names | added | {"final_norm/scale"}
    assert trainable_subset(DEEP, trainable=None, train_last_layers=None) is None
    alone = trainable_subset(DEEP, trainable="norm", train_last_layers=None)
    assert alone is not None
    assert alone.spec == DEEP
    assert all("norm" in name for name in alone.names)


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError) as error:
        trainable_subset(DEEP, trainable="lm_head", train_last_layers=None)
    assert str(error.value).startswith("trainable: pattern 'lm_head' matches no parameter.")
    for name in named(decoder.abstract(DEEP, jnp.float32)):
        assert name in str(error.value)
    with pytest.raises(ConfigError, match=r"train_last_layers: the last 4 layers .* has 3"):
        trainable_subset(DEEP, trainable=None, train_last_layers=4)


def cut(params: Any, spec: ModelSpec) -> Any:
    """Parameters of `DEEP` as those of the same model in stacks cut after the first layer."""
    leaves = {}
    for name, leaf in named(params).items():
        if name.startswith("stack_0/"):
            leaves[name] = leaf[:1]
            leaves[name.replace("stack_0/", "stack_1/")] = leaf[1:]
        else:
            leaves[name] = leaf
    return {name: leaves[name] for name in named(decoder.abstract(spec, jnp.float32))}


@pytest.mark.slow
def test_two_layers_train_as_within_the_whole_and_the_rest_keeps_every_byte() -> None:
    """SGD with no clipping moves each leaf by its own gradient alone: the trained ones go where
    full training takes them, the first step exactly as far."""
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2, "context": 1})
    chosen = trainable_subset(DEEP, trainable="^head/", train_last_layers=2)
    assert chosen is not None
    params = jax.device_get(decoder.init(DEEP, jax.random.key(0), jnp.float32))
    rows = one_per_row()

    def stepped(spec: ModelSpec, variables: Any, **options: Any) -> Any:
        built = program.build(
            spec,
            mesh,
            program.StepConfig(
                hyper=optim.Hyper("sgd", momentum=0.9),
                learning_rate=lambda step: jnp.float32(0.1),
                max_grad_norm=0.0,
                microbatches=1,
                dtype=jnp.float32,
                param_dtype=jnp.float32,
                remat="full",
                **options,
            ),
        )
        with jax.set_mesh(mesh):
            variables = {"params": jax.device_put(variables, built.placed["params"])}
            state, frozen = built.first_state(variables)
            before = jax.device_get(frozen)
            batch = put_batch(
                lambda lo, hi: type(rows)(*(x[lo:hi] for x in rows)),
                batch_size=rows.inputs.shape[0], length=rows.inputs.shape[1], mesh=mesh,
            )  # fmt: skip
            state, metrics = built.train_step(state, frozen, batch)
            sums = built.eval_step(state.trained, frozen, batch)
        for name, leaf in named(before).items():
            assert np.asarray(named(frozen)[name]).tobytes() == leaf.tobytes(), name
        return built, state, frozen, float(metrics.loss), float(sums.loss)

    _, whole, none, whole_loss, _ = stepped(DEEP, params)
    begun = unnamed(cut(params, chosen.spec))
    built, some, frozen, loss, _ = stepped(chosen.spec, begun, is_trained=chosen.is_trained)
    assert none == {}
    assert loss == pytest.approx(whole_loss, abs=1e-5)
    expected = cut(jax.device_get(whole.trained["params"]), chosen.spec)
    moved = named(jax.device_get(some.trained["params"]))
    assert moved.keys() == chosen.names
    for name, leaf in moved.items():
        np.testing.assert_allclose(leaf, expected[name], atol=1e-6, err_msg=name)
        assert np.abs(leaf - named(begun)[name]).max() > 1e-4, name
    momentum = jax.tree.leaves(built.abstract.opt_state)
    trained_size = sum(leaf.size for leaf in moved.values())
    assert sum(leaf.size for leaf in momentum) == trained_size
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert named(merge(some.trained, frozen)["params"]).keys() == named(begun).keys()
    said = share(built.abstract.trained, built.variables)
    assert said == f"{trained_size:,} of {total:,} parameters ({100 * trained_size / total:.3g}%)"


@pytest.mark.parametrize(("trainable", "backward"), [(None, 1), ("stack_0/.*norm", 2)])
def test_the_backward_pass_ends_at_the_first_trained_layer(
    trainable: str | None, backward: int
) -> None:
    """Of two scanned stacks the lower one runs backward only if something in it is trained."""
    chosen = trainable_subset(DEEP, trainable=trainable, train_last_layers=2)
    assert chosen is not None
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1}, jax.devices()[:1])
    built = program.build(
        chosen.spec,
        mesh,
        program.StepConfig(
            hyper=optim.Hyper(),
            learning_rate=lambda step: jnp.float32(0.1),
            max_grad_norm=1.0,
            microbatches=1,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            remat="full",
            is_trained=chosen.is_trained,
        ),
    )
    _, frozen = split(built.variables, chosen.is_trained)
    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(built.train_step)(built.abstract, frozen, one_per_row())
    layers = [e.params["reverse"] for e in scans(jaxpr.jaxpr) if e.params["length"] in (1, 2)]
    assert layers.count(False) == 2
    assert layers.count(True) == backward


LAYER = LayerSpec(4, 2, 8, 64, RopeSpec())
PLAIN = ModelSpec(256, 32, (Stack((LAYER,), 4),), 1e-5, False, 4096)
T = 8


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"train_last_layers": 1},
        {"trainable": "mlp/down", "train_last_layers": 2},
        {"trainable": "stack_0/.*norm"},
        {"trainable": "^head|final_norm"},
        {"lora": Lora(2, 1.0)},
    ],
    ids=lambda value: " ".join(value) or "everything",
)
def test_the_products_that_are_counted_are_those_of_the_compiled_step(chosen: Any) -> None:
    """To the last one; adapters' own, three passes over them, are not counted."""
    lora, fields = chosen.get("lora"), ("trainable", "train_last_layers")
    some = trainable_subset(PLAIN, **{name: chosen.get(name) for name in fields})
    spec = PLAIN if some is None else some.spec
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1}, jax.devices()[:1])
    built = program.build(
        spec,
        mesh,
        program.StepConfig(
            hyper=optim.Hyper("sgd"),
            learning_rate=lambda step: jnp.float32(0.1),
            max_grad_norm=1.0,
            microbatches=1,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            remat="none",
            is_trained=None if some is None else some.is_trained,
            lora=lora,
        ),
    )
    _, frozen = split(built.variables, built.is_trained)
    rows = Batch(*(jax.ShapeDtypeStruct((2, T), leaf.dtype) for leaf in one_per_row()))
    with jax.set_mesh(mesh):
        text = built.train_step.lower(built.abstract, frozen, rows).compile().as_text()
    back = backward(spec, built.abstract.trained)
    attention = sum(
        stack.repeats * attention_flops_per_token(LAYER, T) * (3 if back.reaches(i) else 1)
        for i, stack in enumerate(spec.stacks)
    )
    # The reference multiplies what a causal mask hides, too.
    counted = flops_per_token(spec, T, back) + attention * (2 * T / (T + 1) - 1)
    found = hlo_cost.cost(text, 1).matmul_flops / (2 * T)
    assert counted + (6 * back.numbers if lora else 0) == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("tie_head", [False, True])
def test_everything_that_is_trained_is_counted(tie_head: bool) -> None:
    mixed = replace(LAYER, moe=MoeSpec(6, 2, shared_width=24))
    spec = replace(PLAIN, stacks=(Stack((LAYER, mixed), 2),), tie_head=tie_head)
    every = backward(spec, {"params": decoder.abstract(spec, jnp.float32)})
    assert every == whole_backward(spec)


def scans(jaxpr: Any) -> Iterator[Any]:
    """Scans that are in no other scan."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        else:
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from scans(inner)
