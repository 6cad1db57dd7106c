"""Every mesh gives the loss and gradients of one device: all families, packed rows.

Windows, sinks, softcap, routers and frequencies that follow from a text's length are among the
families' own switches; texts cross the edges between devices that share a row.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.cases import CASES, VOCAB, write_folder

from jaxtune.collectives import EVERYWHERE, per_device, slices, tokens
from jaxtune.hf.load import load_params, open_model
from jaxtune.learn.objectives import next_token
from jaxtune.learn.step import gradient
from jaxtune.mesh import make_mesh, shardings
from jaxtune.model import decoder
from jaxtune.ops.cross_entropy import Sums
from jaxtune.spec import ModelSpec
from jaxtune.tree import map_named

ROWS, LENGTH = 8, 32
ONES = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}
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
# break. A program takes some five seconds to compile, so each family has one mesh.
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


@functools.cache
def model(name: str) -> tuple[ModelSpec, Any]:
    with tempfile.TemporaryDirectory() as folder:
        opened = open_model(write_folder(name, Path(folder)))
        return opened.spec, {"params": load_params(opened, None, jnp.float32)}


def gradients(name: str, sizes: dict[str, int], attention: str) -> tuple[Any, Sums]:
    """Of the sum of the loss and what is minimised with it, on a mesh of `sizes`."""
    spec, variables = model(name)
    sizes = ONES | sizes
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    axes = {"params": decoder.axes(spec)}
    objective = next_token(spec, dtype=jnp.float32, remat="none", attention=attention)
    here = functools.partial(
        gradient,
        objective=objective, microbatches=1, seed=0, dtype=jnp.float32, axes=axes,
        shapes=jax.eval_shape(lambda: variables),
    )  # fmt: skip
    own = slices(axes, variables, mesh)
    given = own, {}, tokens((ROWS, LENGTH), mesh), EVERYWHERE
    with jax.set_mesh(mesh):
        placed = jax.device_put(variables, shardings(axes, variables, mesh))
        run = jax.jit(per_device(here, mesh, given, (own, EVERYWHERE)))
        return jax.device_get(run(placed, {}, packed_rows(), jnp.int32(0)))


@functools.cache
def on_one_device(name: str) -> tuple[Any, Sums]:
    return gradients(name, {}, "reference")


def test_every_family_is_asked() -> None:
    asked = [getattr(case, "values", case)[0] for case in ASKED]
    assert {CASES[name]["model_type"] for name in asked} == {
        case["model_type"] for case in CASES.values()
    }


@pytest.mark.parametrize(("name", "mesh", "attention"), ASKED)
def test_loss_and_gradients_are_those_of_one_device(name: str, mesh: int, attention: str) -> None:
    expected, expected_sums = on_one_device(name)
    grads, sums = gradients(name, MESHES[mesh], attention)
    for ours, theirs in zip(sums, expected_sums, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)

    def compare(leaf: str, ours: np.ndarray, theirs: np.ndarray) -> None:
        # Sums over tokens in another order, of terms that cancel: against the leaf's largest.
        atol = 1e-5 * float(np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=atol, err_msg=leaf)

    map_named(compare, grads, expected)
