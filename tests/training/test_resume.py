"""A run cut in two is the run in one, bit for bit, with every optimiser's state and with noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import SPEC, Batch, assert_bytes, one_per_row

from jaxtune.model import decoder
from jaxtune.parallel.mesh import make_mesh, put_batch
from jaxtune.training import program, schedules
from jaxtune.training.checkpoint.checkpoints import Checkpoints
from jaxtune.training.optim import optim
from jaxtune.tree import named

HYPER = {
    "lion": optim.Hyper("lion", weight_decay=0.1, state_dtype="bfloat16"),
    "adafactor": optim.Hyper("adafactor", weight_decay=0.1),
    "muon": optim.Hyper("muon", momentum=0.95, weight_decay=0.1, state_dtype="bfloat16"),
    "schedule_free": optim.Hyper("schedule_free", weight_decay=0.1),
}


@pytest.mark.parametrize("method", HYPER)
def test_a_resumed_run_is_the_same_run(method: str, tmp_path: Path) -> None:
    """On a mesh, with NEFTune; the first step is of learning rate 0 and must change nothing. One
    optimiser keeps its state in the host's memory."""
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2, "context": 1})
    built = program.build(
        SPEC,
        mesh,
        program.StepConfig(
            hyper=HYPER[method],
            learning_rate=schedules.schedule(
                "constant_with_warmup", learning_rate=0.01, warmup_steps=2, total_steps=9
            ),
            max_grad_norm=1.0,
            microbatches=1,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            remat="none",
            seed=3,
            noise_alpha=5.0,
            optim_offload=method == "schedule_free",
        ),
    )
    rows = one_per_row()

    def go_on(state: Any, steps: int) -> tuple[Any, list[float]]:
        losses = []
        for _ in range(steps):
            batch = put_batch(
                lambda lo, hi: Batch(*(x[lo:hi] for x in rows)),
                batch_size=rows.inputs.shape[0], length=rows.inputs.shape[1], mesh=mesh,
            )  # fmt: skip
            state, metrics = built.train_step(state, {}, batch)
            losses.append(float(metrics.loss))
        return state, losses

    with jax.set_mesh(mesh):
        make = jax.jit(
            lambda key: decoder.init(SPEC, key, jnp.float32), out_shardings=built.placed["params"]
        )
        begun, _ = built.first_state({"params": make(jax.random.key(0))})
        before = jax.device_get(begun.trained)
        after_zero, first = go_on(begun, 1)
        assert_bytes(before, after_zero.trained)
        half, second = go_on(after_zero, 1)
        saved = Checkpoints(tmp_path)
        saved.save(half, {}, step=2)
        saved.wait()
        whole, last = go_on(half, 2)
        restored = saved.restore(2, built.abstract, built.shardings)
        resumed, again = go_on(restored, 2)
        saved.close()
        measured = built.eval_step(whole.trained, {}, rows)
        each = program.build_token_losses(SPEC, mesh, dtype=jnp.float32)(whole.trained, rows)
    without = float((rows.weights * np.asarray(each.loss)).sum())
    assert float(measured.loss) == pytest.approx(without, rel=1e-6)  # no noise in evaluation
    assert float(measured.correct) == (rows.weights * np.asarray(each.correct)).sum()
    assert again == last
    assert first[0] != second[0]  # the same rows and parameters: another step's noise
    assert_bytes(whole, resumed)
    for name, value in named(before).items():
        assert np.abs(np.asarray(named(whole.trained)[name]) - value).max() > 1e-4, name
