"""Experts of a frozen base in 4 or 8 bits: loaded one by one, and the model they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from golden.cases import TEXTS, write_folder

from jaxtune.config import Config
from jaxtune.hf.load import load_params, open_model
from jaxtune.model import decoder
from jaxtune.model.lora import Lora
from jaxtune.model.quantise import dequantise, leaves, quantise
from jaxtune.parallel.mesh import make_mesh, shardings
from jaxtune.training.initial_weights import base_params
from jaxtune.tree import named, unnamed

CASE = "qwen3-moe"  # every second layer a mixture


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora", [Lora(2, 4.0, base="int8"), Lora(2, 4.0, base="nf4", double_quant=True)]
)
def test_each_expert_is_quantised_by_itself_and_used_as_that(lora: Lora, tmp_path: Path) -> None:
    model = open_model(write_folder(CASE, tmp_path))
    spec, mesh = model.spec, make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    abstract = decoder.abstract(spec, jnp.float32, lora)
    placed = shardings(decoder.axes(spec, lora), abstract, mesh)
    found = named(base_params(model, Config(), placed, jnp.float32, lora=lora))
    assert {n: (x.shape, x.dtype) for n, x in found.items()} == {
        n: (x.shape, x.dtype) for n, x in named(abstract).items()
    }

    plain = named(load_params(model, None, jnp.float32))
    banks = [name for name in decoder.banks(spec) if f"{name}/kernel" in plain]
    assert len(banks) == 3
    for name in banks:
        whole = np.array(plain[f"{name}/kernel"])  # [L E in out]
        for at in np.ndindex(whole.shape[:2]):
            alone = quantise(
                jnp.asarray(whole[at]), kind=lora.base, inputs=1, double=lora.double_quant
            )
            for leaf, values in alone.items():
                # Codes exactly; a mean over devices is added up in another order.
                got = np.asarray(found[f"{name}/kernel/{leaf}"][at])
                rtol = 1e-6 if values.dtype == jnp.float32 else 0
                np.testing.assert_allclose(got.astype(float), np.asarray(values, float), rtol)
            whole[at] = dequantise(alone, kind=lora.base, inputs=1, dtype=jnp.float32)
        assert np.abs(whole - plain[f"{name}/kernel"]).max() > 0
        plain[f"{name}/kernel"] = jnp.asarray(whole)
    for name in decoder.projections(spec):
        stored = {leaf: found[f"{name}/kernel/{leaf}"] for leaf in _leaves(found, name)}
        inputs = 2 if name.endswith("/o") else 1
        plain[f"{name}/kernel"] = jnp.stack(
            [
                dequantise(
                    {leaf: values[layer] for leaf, values in stored.items()},
                    kind=lora.base, inputs=inputs, dtype=jnp.float32,
                )
                for layer in range(len(stored["codes"]))
            ]
        )  # fmt: skip

    inputs = jnp.asarray(TEXTS[0])[None]

    def run(params: Any, lora: Lora | None) -> np.ndarray:
        return np.asarray(
            decoder.logits(
                spec, {"params": params}, inputs, segment_ids=jnp.ones_like(inputs),
                positions=jnp.arange(inputs.shape[1])[None], dtype=jnp.float32, remat="none",
                lora=lora,
            )
        )  # fmt: skip

    here = unnamed({name: jnp.asarray(np.asarray(leaf)) for name, leaf in found.items()})
    np.testing.assert_allclose(run(here, lora), run(unnamed(plain), None), rtol=0, atol=1e-5)


def _leaves(found: Any, name: str) -> list[str]:
    return [key.rpartition("/")[2] for key in found if key.startswith(f"{name}/kernel/")]


@pytest.mark.parametrize("double", [False, True])
def test_leaves_of_kernels_side_by_side(double: bool) -> None:
    """Every leaf has the experts in front, and is otherwise that of one expert alone."""
    sizes = {"E": 5, "D": 100, "F": 7}
    alone = leaves("nf4", "DF", "D", sizes, double=double)
    many = leaves("nf4", "EDF", "D", sizes, double=double)
    assert {name: leaf.shape for name, leaf in many.items()} == {
        name: (5, *leaf.shape) for name, leaf in alone.items()
    }
    assert all(leaf.letters == f"E{alone[name].letters}" for name, leaf in many.items())
