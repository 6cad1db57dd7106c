"""Every mesh gives the loss and gradients of one device: all families, packed rows.

Windows, sinks, softcap, routers and frequencies that follow from a text's length are among the
families' own switches; texts cross the edges between devices that share a row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import golden.ours
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.cases import CASES, VOCAB
from golden.ours import LENGTH, ROWS
from jax.sharding import PartitionSpec

from jaxtune.model import decoder
from jaxtune.model.decoder import ForwardConfig
from jaxtune.ops.cross_entropy import Sums
from jaxtune.parallel.collectives import EVERYWHERE, shard_map_step, slices, tokens
from jaxtune.parallel.mesh import make_mesh, shardings
from jaxtune.spec import LayerSpec, ModelSpec, MoeSpec, RopeSpec, Stack
from jaxtune.training.objectives import next_token
from jaxtune.training.step import GradientConfig, gradient
from jaxtune.tree import map_named, named, unnamed

MESHES = (
    {"fsdp": 4, "context": 2},
    {"data": 2, "tensor": 2, "context": 2},
    {"fsdp": 2, "context": 4},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"context": 8},
    {"data": 2, "fsdp": 4},
    {"fsdp": 2, "tensor": 2, "context": 2},
)
# One case of each family, its mesh, its attention; first those that differ in what a cut could
# break. A program takes seconds to compile, so each family has one mesh.
ASKED = [
    ("mistral-window", 0, "blocked"),
    ("llama-head-dim", 1, "reference"),
    ("phi3-longrope", 4, "blocked"),
    ("gpt-oss", 6, "reference"),
    *(
        pytest.param(name, n % len(MESHES), ("blocked", "reference")[n % 2], marks=pytest.mark.slow)
        for n, name in enumerate((
            "gemma", "gemma2", "gemma3", "granite", "llama-biases", "mixtral", "olmo2", "olmo3",
            "olmoe", "qwen2-moe", "qwen2-windows", "qwen3", "qwen3-moe", "smollm3", "starcoder2",
            "ministral3", "seed-oss", "glm", "glm4", "exaone4",
        ))
    ),
]  # fmt: skip


class Batch(NamedTuple):
    inputs: Any
    targets: Any
    weights: Any
    segment_ids: Any
    positions: Any


def packed_rows() -> Batch:
    """Texts of 2 to 32 tokens packed as they come, some rows with padding at the end."""
    rng = np.random.default_rng(4)
    shape = (ROWS, LENGTH)
    inputs, targets = rng.integers(3, VOCAB, (2, *shape), dtype=np.int32)
    weights = np.round(rng.random(shape) * (rng.random(shape) < 0.7), 2).astype(np.float32)
    segments, positions = np.zeros((2, *shape), np.int32)
    for row in range(ROWS):
        at = 0
        for segment, n in enumerate([LENGTH] if row == 0 else rng.integers(2, 20, 4), start=1):
            n = min(int(n), LENGTH - at)
            segments[row, at : at + n], positions[row, at : at + n] = segment, np.arange(n)
            at += n
    weights[segments == 0] = 0
    return Batch(inputs, targets, weights, segments, positions)


# Eight experts with biases, of which a token uses two, and one that all share; balanced by a loss.
MOE = MoeSpec(
    8, 2, softmax_over="all", router_bias=True, clamp=(1.7, 2.0), shared_width=20, aux_coef=0.3
)
EXPERTS = ModelSpec(
    VOCAB, 16,
    (Stack((LayerSpec(4, 2, 8, 16, RopeSpec(), mlp_bias=True, moe=MOE),), 2),),
    1e-6, False, 64,
)  # fmt: skip
# Slices of its 24 rows would not be whole tiles, so its MLPs are cut along their width.
WIDE = ModelSpec(
    VOCAB, 24,
    (
        Stack((LayerSpec(4, 2, 8, 128, RopeSpec()),), 2),
        Stack((LayerSpec(4, 2, 8, 128, RopeSpec(), moe=MoeSpec(4, 2)),), 1),
    ),
    1e-6, False, 64,
)  # fmt: skip
LEANS = {  # what is added to the routers' biases
    "as they come": (0, 0, 0, 0, 0, 0, 0, 0),
    "all to one device": (0, 0, 30, 29, 0, 0, 0, 0),
    "one of none": (0, 0, 0, 0, 0, -30, 0, 0),
}


@functools.cache
def model(name: str) -> tuple[ModelSpec, Any]:
    if name in CASES:
        imported, run = golden.ours.program(name)
        return imported.spec, {"params": run.args[0]}
    if name == "wide":
        return WIDE, {"params": decoder.init(WIDE, jax.random.key(6), jnp.float32)}
    rng = np.random.default_rng(6)
    values = {
        leaf: 0.3 * rng.normal(size=shape.shape).astype(np.float32)
        + np.float32(LEANS[name] if leaf.endswith("router/bias") else 0)
        for leaf, shape in named(decoder.abstract(EXPERTS, jnp.float32)).items()
    }
    return EXPERTS, {"params": unnamed(values)}


@functools.cache
def program(spec: ModelSpec, sizes: tuple[tuple[str, int], ...], attention: str) -> Any:
    """Variables -> the gradients of the sum of the loss and what is minimised with it, and sums."""
    mesh = make_mesh(dict(sizes), jax.devices()[: math.prod(size for _, size in sizes)])
    axes, variables = {"params": decoder.axes(spec)}, {"params": decoder.abstract(spec, "f4")}
    objective = next_token(spec, ForwardConfig(jnp.float32, "none", attention))
    here = functools.partial(
        gradient,
        config=GradientConfig(objective, microbatches=1, seed=0, dtype=jnp.float32), axes=axes,
        shapes=variables,
    )  # fmt: skip
    own = slices(axes, variables, mesh)
    given = own, {}, tokens((ROWS, LENGTH), mesh), EVERYWHERE
    run = jax.jit(shard_map_step(here, mesh, given, (own, EVERYWHERE)))

    def placed_run(variables: Any) -> tuple[Any, Sums]:
        with jax.set_mesh(mesh):
            placed = jax.device_put(variables, shardings(axes, variables, mesh))
            return jax.device_get(run(placed, {}, packed_rows(), jnp.int32(0)))

    return placed_run


@functools.cache
def on_one_device(name: str) -> tuple[Any, Sums]:
    """Of a family's case by the program that hf/test_parity compares with transformers."""
    spec, variables = model(name)
    if name not in CASES:
        return program(spec, (), "reference")(variables)
    batch = packed_rows()
    (loss, logits), grads = golden.ours.program(name)[1](batch._asdict())
    weight, hit = batch.weights.sum(), np.argmax(logits, axis=-1) == batch.targets
    total = loss * weight
    sums = Sums(total, weight, (batch.weights * hit).sum(), nll=total)
    return {"params": map_named(lambda _, value: value * weight, grads)}, sums


def test_every_family_is_asked() -> None:
    asked = [getattr(case, "values", case)[0] for case in ASKED]
    assert {CASES[name]["model_type"] for name in asked} == {
        case["model_type"] for case in CASES.values()
    }


def grouped(cases: Sequence[Any]) -> list[Any]:
    """The cases, all of a model in one worker, as in hf/test_parity: it is compiled once."""
    sets = [case if hasattr(case, "marks") else pytest.param(*case) for case in cases]
    groups = ["experts" if case.values[0] in LEANS else case.values[0] for case in sets]
    return [
        pytest.param(*case.values, marks=(*case.marks, pytest.mark.xdist_group(group)))
        for case, group in zip(sets, groups, strict=True)
    ]


@pytest.mark.parametrize(("name", "mesh", "attention"), grouped(ASKED))
def test_loss_and_gradients_are_those_of_one_device(name: str, mesh: int, attention: str) -> None:
    assert_those_of_one_device(name, MESHES[mesh], attention)


# Experts on devices of their own; the last of it tokens that all want the same device's, and an
# expert and a device that nobody wants.
EXPERT_MESHES: list[Any] = [
    ("as they come", {"expert": 8}),
    ("as they come", {"fsdp": 2, "expert": 2, "tensor": 2}),
    ("gpt-oss", {"expert": 4, "context": 2}),
    ("all to one device", {"fsdp": 2, "expert": 4}),
    *(
        pytest.param(name, sizes, marks=pytest.mark.slow)
        for name, sizes in (
            ("as they come", {"data": 2, "expert": 4}),
            ("as they come", {"expert": 2, "tensor": 2, "context": 2}),
            ("all to one device", {"expert": 8}),
            ("one of none", {"expert": 8}),
            ("qwen2-moe", {"fsdp": 4, "expert": 2}),
            ("qwen3-moe", {"expert": 2, "context": 4}),
            ("gpt-oss", {"expert": 4, "tensor": 2}),
        )
    ),
]


@pytest.mark.parametrize(("name", "sizes"), grouped(EXPERT_MESHES))
def test_experts_on_devices_of_their_own_are_those_of_one(name: str, sizes: dict[str, int]) -> None:
    assert_those_of_one_device(name, sizes, "reference")


def test_weights_that_are_cut_along_their_width_are_those_of_one_device() -> None:
    placed = named(
        shardings(decoder.axes(WIDE), decoder.abstract(WIDE, "f4"), make_mesh({"fsdp": 8}))
    )
    cut = {leaf: where.spec for leaf, where in placed.items() if leaf.endswith("up/kernel")}
    assert cut == {
        "stack_0/layer_0/mlp/up/kernel": PartitionSpec(None, None, "fsdp"),
        "stack_1/layer_0/moe/up/kernel": PartitionSpec(None, None, None, "fsdp"),
    }
    assert_those_of_one_device("wide", {"fsdp": 8}, "reference")
    assert_those_of_one_device("wide", {"fsdp": 4, "context": 2}, "blocked")


def test_a_device_holds_its_own_experts_and_a_slice_of_other_weights() -> None:
    mesh = make_mesh({"fsdp": 2, "expert": 4})
    abstract = decoder.abstract(EXPERTS, jnp.float32)
    placed = named(shardings(decoder.axes(EXPERTS), abstract, mesh))
    for leaf, shape in named(abstract).items():
        part = placed[leaf].shard_shape(shape.shape)
        cut = [whole // own for whole, own in zip(shape.shape, part, strict=True)]
        if "/moe/" in leaf and "shared" not in leaf and "router" not in leaf:
            kernel = [1, 4, 1, 2] if "down" in leaf else [1, 4, 2, 1]  # [L E F D], [L E D F]
            assert cut == (kernel if leaf.endswith("kernel") else [1, 4, 1]), leaf
        elif leaf.endswith(("kernel", "table")):
            assert sorted(cut)[-1] == 8, leaf


def assert_those_of_one_device(name: str, sizes: dict[str, int], attention: str) -> None:
    expected, expected_sums = on_one_device(name)
    spec, variables = model(name)
    grads, sums = program(spec, tuple(sizes.items()), attention)(variables)
    assert name not in LEANS or float(sums.auxiliary) > 0
    for ours, theirs in zip(sums, expected_sums, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)

    def compare(leaf: str, ours: np.ndarray, theirs: np.ndarray) -> None:
        # Sums over tokens in another order, of terms that cancel: against the leaf's largest.
        atol = 1e-5 * float(np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=atol, err_msg=leaf)

    map_named(compare, grads, expected)
