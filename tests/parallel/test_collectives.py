"""What the devices of a compiled step send each other, read in its optimised HLO.

Weights are gathered one at a time and their gradients reduce-scattered; nothing that is cut is
ever made whole along its layers, all-reduced whole, or moved by the partitioner for want of a
better way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from jaxtune.parallel.mesh import make_mesh
from jaxtune.planning import hlo_cost
from jaxtune.planning.compile import arguments
from jaxtune.spec import LayerSpec, ModelSpec, RopeSpec, Stack
from jaxtune.training import program, schedules
from jaxtune.training.optim import optim

LAYERS, WIDTH, MLP, VOCAB, ROWS, LENGTH = 3, 64, 160, 320, 8, 32
LAYER = LayerSpec(heads=4, kv_heads=4, head_dim=16, rope=RopeSpec(10_000.0), mlp_width=MLP)
MESHES = [
    ({"fsdp": 8}, (2, 4)),
    ({"fsdp": 4, "tensor": 2}, (2, 2)),
    ({"data": 2, "fsdp": 2, "context": 2}, (2,)),
]


def hlo(sizes: dict[str, int], torus: tuple[int, ...], *, tied: bool) -> hlo_cost.Module:
    spec = ModelSpec(
        vocab=VOCAB,
        width=WIDTH,
        norm_eps=1e-5,
        max_positions=LENGTH,
        stacks=(Stack((LAYER,), LAYERS),),
        tie_head=tied,
    )
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1, **sizes}, torus=torus)
    built = program.build(
        spec,
        mesh,
        program.StepConfig(
            hyper=optim.Hyper(),
            learning_rate=schedules.schedule(
                "constant", learning_rate=0.1, warmup_steps=0, total_steps=9
            ),
            max_grad_norm=1.0,
            microbatches=1,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            remat="full",
            loss_block=VOCAB // 2,
        ),
    )
    with jax.set_mesh(mesh):
        lowered = built.train_step.lower(*arguments(built, rows=ROWS, length=LENGTH))
        return hlo_cost.parse(lowered.compile().as_text())


def sent(module: hlo_cost.Module, kind: str) -> Iterator[tuple[int, str]]:
    """(elements of the largest result, name) of every collective of a kind."""
    for at in module.computations.values():
        for each in at.instructions.values():
            if each.op.removesuffix("-start") == kind:
                yield max(math.prod(shape.sizes) for shape in each.shapes), each.name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("sizes", "torus"), MESHES, ids=str)
def test_weights_are_gathered_one_by_one_and_gradients_reduce_scattered(
    sizes: dict[str, int], torus: tuple[int, ...], tied: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    module = hlo(sizes, torus, tied=tied)
    assert "ematerialization" not in capfd.readouterr().err  # "involuntary full ...", by XLA
    tensor = sizes.get("tensor", 1)
    here = ROWS // sizes.get("data", 1) // sizes["fsdp"] * LENGTH // sizes.get("context", 1)
    kernel = WIDTH * MLP // tensor
    block = WIDTH * VOCAB // 2 // tensor
    gathers = list(sent(module, "all-gather"))
    assert gathers
    assert max(gathers)[0] <= max(kernel, block), max(gathers)
    along = sum(size > 1 for size in torus) + (sizes.get("context", 1) > 1)
    scatters = list(sent(module, "reduce-scatter"))
    assert len(scatters) >= 7 * along  # seven kernels a layer, along every dimension of the network
    # What is all-reduced: norms, sums, over data the gradients of slices, over tensor activations.
    slices = VOCAB * WIDTH // sizes["fsdp"] // sizes.get("context", 1) if "data" in sizes else 0
    sums = here * WIDTH * 2 if tensor > 1 else 0
    most = max((LAYERS + 1) * WIDTH * 2, slices, LAYERS * kernel // 4 if slices else 0, sums)
    reduced = list(sent(module, "all-reduce"))
    assert max(reduced)[0] <= most, (max(reduced), most)
