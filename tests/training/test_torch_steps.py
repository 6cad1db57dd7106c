"""Twenty steps of the whole program against transformers and torch.optim.AdamW, same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.cases import VOCAB, write_folder

from jaxtune.hf.load import load_params, open_model
from jaxtune.parallel.mesh import make_mesh, put_batch
from jaxtune.training import program, schedules
from jaxtune.training.optim import optim

STEPS, ROWS, LENGTH = 20, 8, 16
LR, WARMUP, DECAY, CLIP = 3e-3, 4, 0.05, 1.0


class Batch(NamedTuple):
    inputs: Any
    targets: Any
    weights: Any
    segment_ids: Any
    positions: Any


def batch(step: int) -> Batch:
    """Four sequences over and over, so that the loss falls; lengths and weights differ by row."""
    rng = np.random.default_rng(step % 4)
    ids = rng.integers(3, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    lengths = rng.integers(3, LENGTH + 1, ROWS)
    real = np.arange(LENGTH) < lengths[:, None]
    trained = real & (np.arange(LENGTH) >= rng.integers(0, 3, ROWS)[:, None])
    return Batch(
        inputs=np.where(real, ids[:, :-1], 0),
        targets=np.where(real, ids[:, 1:], 0),
        weights=trained.astype(np.float32) * np.float32(rng.choice([0.5, 1.0])),
        segment_ids=real.astype(np.int32),
        positions=np.where(real, np.arange(LENGTH), 0).astype(np.int32),
    )


def losses_of_torch(folder: Path) -> list[float]:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, get_scheduler

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    model.train()
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        (kept if "norm" in name or name.endswith("bias") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": kept, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=LR)
    scheduler = get_scheduler("linear", optimiser, WARMUP, STEPS)
    losses = []
    for step in range(STEPS):
        rows = batch(step)
        mask = torch.tensor(rows.segment_ids, dtype=torch.long)
        logits = model(input_ids=torch.tensor(rows.inputs).long(), attention_mask=mask).logits
        ce = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.tensor(rows.targets).long().flatten(), reduction="none"
        )
        weights = torch.tensor(rows.weights).flatten()
        loss = (weights * ce).sum() / weights.sum()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def losses_of_ours(folder: Path) -> list[float]:
    model = open_model(folder)
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2, "context": 1}, jax.devices()[:4])
    built = program.build(
        model.spec,
        mesh,
        program.StepConfig(
            hyper=optim.Hyper(weight_decay=DECAY),
            learning_rate=schedules.schedule(
                "linear", learning_rate=LR, warmup_steps=WARMUP, total_steps=STEPS
            ),
            max_grad_norm=CLIP,
            microbatches=2,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            remat="full",
        ),
    )
    losses = []
    with jax.set_mesh(mesh):
        params = load_params(model, built.placed["params"], jnp.float32)
        state, frozen = built.first_state({"params": params})
        for step in range(STEPS):
            rows = batch(step)
            placed = put_batch(
                lambda lo, hi, rows=rows: Batch(*(x[lo:hi] for x in rows)),
                batch_size=ROWS, length=LENGTH, mesh=mesh,
            )  # fmt: skip
            state, metrics = built.train_step(state, frozen, placed)
            losses.append(float(metrics.loss))
    return losses


@pytest.mark.torch
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-tied", "qwen3"])
def test_twenty_steps_follow_torch(name: str, tmp_path: Path) -> None:
    """f32; two correct programs drift apart by rounding, amplified by Adam: 1e-4 over 20 steps."""
    folder = write_folder(name, tmp_path)
    theirs = losses_of_torch(folder)
    ours = losses_of_ours(folder)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert ours[-1] < ours[0] - 0.1
