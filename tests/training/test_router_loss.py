"""The routers' load-balancing loss: transformers' number and gradient, and its place in a step."""

import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.cases import TEXTS, WEIGHTS, write_folder

from jaxtune.hf.load import load_params, open_model
from jaxtune.model.decoder import ForwardConfig
from jaxtune.ops.cross_entropy import Sums
from jaxtune.training.objectives import next_token
from jaxtune.training.optim import optim
from jaxtune.training.state import TrainState
from jaxtune.training.step import GradientConfig, gradient, train_step
from jaxtune.tree import named

COEF = 0.05
# `aux_loss` of transformers 5.23 for TEXTS in one padded batch; checked below where torch is.
BALANCE = {"qwen3-moe": 3.2267127, "gpt-oss": 2.0650549}


class Batch(NamedTuple):
    inputs: Any
    targets: Any
    weights: Any
    segment_ids: Any
    positions: Any


def _batch(layout: tuple[tuple[int, ...], ...]) -> Batch:
    """Texts laid out in rows of 30, targets shifted within each text."""
    ints = [np.zeros((len(layout), 30), np.int32) for _ in range(4)]
    batch = Batch(ints[0], ints[1], np.zeros((len(layout), 30), np.float32), *ints[2:])
    for row, texts in enumerate(layout):
        at = 0
        for segment, text in enumerate(texts, start=1):
            n = len(TEXTS[text])
            batch.inputs[row, at : at + n] = TEXTS[text]
            batch.targets[row, at : at + n - 1] = TEXTS[text][1:]
            batch.weights[row, at : at + n - 1] = WEIGHTS[text][1:]
            batch.segment_ids[row, at : at + n] = segment
            batch.positions[row, at : at + n] = np.arange(n)
            at += n
    return batch


ALONE, PACKED = _batch(((0,), (1,), (2,))), _batch(((0, 1), (2,), ()))


@functools.cache
def _model(name: str):
    """The model and (params, batch) -> ((penalty, sums), gradient of the penalty)."""
    with tempfile.TemporaryDirectory() as folder:
        asked = {"output_router_logits": True, "router_aux_loss_coef": COEF}
        model = open_model(write_folder(name, Path(folder), **asked))
        params = load_params(model, None, jnp.float32)
    objective = next_token(model.spec, ForwardConfig(jnp.float32))

    def penalty(params, batch):
        sums = objective({"params": params}, batch, None)
        return sums.auxiliary, sums

    return model, params, jax.jit(jax.value_and_grad(penalty, has_aux=True))


@pytest.mark.parametrize("name", BALANCE)
def test_the_value_is_that_of_transformers_however_the_texts_lie(name):
    _, params, run = _model(name)
    for batch in (ALONE, PACKED):
        (penalty, sums), _ = run(params, batch)
        assert float(penalty / sums.weight) == pytest.approx(COEF * BALANCE[name], rel=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("name", BALANCE)
def test_value_and_gradient_against_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    theirs = AutoModelForCausalLM.from_pretrained(
        write_folder(name, tmp_path), dtype=torch.float32, attn_implementation="eager"
    )
    ids, mask = (torch.zeros(3, 18, dtype=torch.long) for _ in range(2))
    for row, text in enumerate(TEXTS):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    out = theirs(input_ids=ids, attention_mask=mask, output_router_logits=True)
    assert out.aux_loss.item() == pytest.approx(BALANCE[name], rel=1e-6)
    out.aux_loss.backward()
    found = {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    expected = revert_weight_conversion(theirs, found)

    model, params, run = _model(name)
    (_, sums), gradients = run(params, PACKED)
    leaves, seen = named(gradients), 0
    for parameter, placed in model.placed.items():
        scaled = np.asarray(leaves[parameter]) / float(sums.weight) / COEF
        for piece in placed.pieces():
            if placed.part is None and piece.name in expected:
                at = tuple(piece.place.get(axis, slice(None)) for axis in placed.row.axes)
                want = expected[piece.name].numpy()
                atol = 1e-4 * np.abs(want).max() + 1e-9
                got = placed.write(scaled[at])
                np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=piece.name)
                seen += "router/kernel" in parameter and bool(np.abs(want).max() > 1e-4)
    assert seen == sum(layer.moe is not None for layer in model.spec.layers)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_step_minimises_the_sum_and_reports_the_parts(microbatches):
    """loss = sum(w x), penalty = weight * x ** 2 of rows [w]: the gradient by hand."""
    weights = np.array([[1.0], [2.0], [3.0], [4.0]], np.float32)
    batch = Batch(*[weights] * 5)

    def objective(variables, rows, key):
        x, weight = variables["x"]["scale"], rows.weights.sum()
        return Sums(weight * 5 * x, weight, weight, weight * rows.weights.max() * x**2)

    optimiser = optim.optimiser(optim.Hyper(), {})
    trained = {"x": {"scale": jnp.float32(3)}}
    state = TrainState(jnp.int32(0), trained, optimiser.init(trained))

    def of_batch(*given):
        return gradient(
            *given, config=GradientConfig(objective, microbatches, 0, jnp.float32),
            axes={"x": {"scale": ()}}, shapes=trained,
        )  # fmt: skip

    _, metrics = train_step(
        state, {}, batch, gradient=of_batch, optimiser=optimiser,
        learning_rate=lambda step: jnp.float32(0), max_grad_norm=0.0,
    )  # fmt: skip
    # Microbatches take rows in turn: weights (1, 3) and (2, 4), largest 3 and 4.
    factor = 4.0 if microbatches == 1 else (4 * 3 + 6 * 4) / 10
    assert float(metrics.loss) == pytest.approx(15)
    assert float(metrics.auxiliary) == pytest.approx(factor * 9)
    assert float(metrics.grad_norm) == pytest.approx(5 + factor * 2 * 3)
