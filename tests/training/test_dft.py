"""Dynamic fine-tuning against TRL: the loss of a step and its gradients on a tiny Llama."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.cases import write_folder
from golden.dft import CASE, FILE, GRADIENTS
from golden.ours import ALONE, GRADIENT, LOSS, PACKED, as_in_checkpoint, rows

from jaxtune.hf.load import load_params, open_model
from jaxtune.model.decoder import ForwardConfig
from jaxtune.training.objectives import next_token


@pytest.mark.parametrize("layout", [ALONE, PACKED])
def test_equals_trl(layout: tuple[tuple[int, ...], ...], tmp_path: Path) -> None:
    """TRL counts tokens: all weights are 1. Gradients are compared to a share of the largest."""
    model = open_model(write_folder(CASE, tmp_path))
    params = load_params(model, None, jnp.float32)
    batch = rows(layout)
    batch["weights"] = np.sign(batch["weights"])
    objective = next_token(model.spec, ForwardConfig(jnp.float32, "none"), loss_type="dft")

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params, batch):  # type: ignore[no-untyped-def]
        sums = objective({"params": params}, SimpleNamespace(**batch), None)
        return sums.loss / sums.weight, sums

    (loss, sums), gradients = run(params, batch)
    ours = as_in_checkpoint(model, gradients)
    with np.load(FILE) as theirs:
        assert sums.weight == theirs["trained"]
        assert float(loss) == pytest.approx(float(theirs["loss"]), abs=LOSS)
        for name in GRADIENTS:
            atol = GRADIENT * np.abs(theirs[name]).max()
            np.testing.assert_allclose(ours[name], theirs[name], atol=atol, err_msg=name)
