"""The decoder with imported weights against transformers: logits, loss, every gradient.

The reference is stored (`tests/golden`, made by transformers); with torch it is also computed live
and the stored values are checked against it. Tolerances, float32 on CPU: two correct programs
differ by reassociated sums of at most 48 terms: measured 6e-6, 5e-7 and 4e-6.
"""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.cases import CASES, NEW_TOKENS, PROMPTS, TEXTS, WEIGHTS, sampled, write_folder
from golden.make import reference, stored

from jaxtune.hf.load import HfModel, load_params, open_model
from jaxtune.model import decoder
from jaxtune.model.sample import generate
from jaxtune.ops.cross_entropy import linear_cross_entropy, logits
from jaxtune.tree import named

LOGITS, LOSS, GRADIENT = 2e-5, 1e-5, 1e-4

PACKED = ((0, 1), (2,), ())  # texts of each row; as many rows, so that one program serves both
ALONE = ((0,), (1,), (2,))


class Ours(NamedTuple):
    logits: tuple[np.ndarray, ...]  # of each text
    loss: float
    gradients: dict[str, np.ndarray]  # under the checkpoint's names


def _rows(layout: tuple[tuple[int, ...], ...]) -> dict[str, np.ndarray]:
    """Texts laid out in rows of 30; targets shifted within each text, padding in segment 0."""
    names = ("inputs", "targets", "segment_ids", "positions")
    batch = {name: np.zeros((len(layout), 30), np.int32) for name in names}
    batch["weights"] = np.zeros((len(layout), 30), np.float32)
    for row, texts in enumerate(layout):
        at = 0
        for segment, text in enumerate(texts, start=1):
            size = len(TEXTS[text])
            cut = slice(at, at + size)
            batch["inputs"][row, cut] = TEXTS[text]
            batch["targets"][row, at : at + size - 1] = TEXTS[text][1:]
            batch["weights"][row, at : at + size - 1] = WEIGHTS[text][1:]
            batch["segment_ids"][row, cut] = segment
            batch["positions"][row, cut] = np.arange(size)
            at += size
    return batch


@functools.cache
def _program(name: str) -> tuple[HfModel, Callable[[Any], Any]]:
    """The imported model and batch -> ((loss, logits), gradients), compiled once."""
    with tempfile.TemporaryDirectory() as folder:
        model = open_model(write_folder(name, Path(folder)))
        params = load_params(model, None, jnp.float32)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params, batch):
        output = decoder.forward(
            model.spec,
            {"params": params},
            batch["inputs"],
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
            dtype=jnp.float32,
            remat="none",
        )
        sums = linear_cross_entropy(
            output.hidden, output.head, batch["targets"], batch["weights"], chunk=11
        )
        return sums.loss / sums.weight, logits(output.hidden, output.head)

    return model, functools.partial(run, params)


@functools.cache
def ours(name: str, layout: tuple[tuple[int, ...], ...]) -> Ours:
    model, run = _program(name)
    (loss, logits), grads = run(_rows(layout))
    by_text, leaves = {}, named(grads)
    for row, texts in enumerate(layout):
        at = 0
        for text in texts:
            by_text[text] = np.asarray(logits[row, at : at + len(TEXTS[text])])
            at += len(TEXTS[text])
    gradients = {}
    for parameter, placed in model.placed.items():
        values = np.asarray(leaves[parameter])
        for piece in placed.pieces():
            at = tuple(piece.place.get(axis, slice(None)) for axis in placed.row.axes)
            gradients[piece.name] = placed.write(values[at], gradients.get(piece.name))
    return Ours(tuple(by_text[i] for i in range(len(TEXTS))), float(loss), gradients)


@pytest.mark.parametrize("name", CASES)
def test_against_stored_values(name):
    expected, found = stored(name), ours(name, PACKED)
    for want, got in zip(expected.logits, found.logits, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=LOGITS)
    assert found.loss == pytest.approx(expected.loss, abs=LOSS)
    assert found.gradients.keys() == expected.gradients.keys()
    for key, (largest, *places, squares) in expected.gradients.items():
        got = sampled(found.gradients[key])
        np.testing.assert_allclose(got[:-1], places, rtol=0, atol=GRADIENT * largest, err_msg=key)
        np.testing.assert_allclose(got[-1], squares, rtol=2 * GRADIENT, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_packed_equals_alone(name):
    packed, alone = ours(name, PACKED), ours(name, ALONE)
    for a, b in zip(packed.logits, alone.logits, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    assert packed.loss == pytest.approx(alone.loss, abs=1e-6)
    for key, gradient in alone.gradients.items():
        atol = 1e-5 * np.abs(gradient).max()
        np.testing.assert_allclose(packed.gradients[key], gradient, 0, atol, err_msg=key)


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
def test_against_transformers(name, tmp_path):
    pytest.importorskip("torch")
    expected, found = reference(write_folder(name, tmp_path)), ours(name, PACKED)
    for want, got in zip(expected.logits, found.logits, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=LOGITS)
    assert found.loss == pytest.approx(expected.loss, abs=LOSS)
    assert found.gradients.keys() == expected.gradients.keys()
    for key, gradient in expected.gradients.items():
        atol = GRADIENT * np.abs(gradient).max()
        np.testing.assert_allclose(found.gradients[key], gradient, 0, atol, err_msg=key)

    kept = stored(name)
    np.testing.assert_allclose(
        np.concatenate(kept.logits), np.concatenate(expected.logits), 0, 1e-5
    )
    assert [list(tokens) for tokens in kept.generated] == [list(t) for t in expected.generated]


@pytest.mark.parametrize(
    "name", [name for name in CASES if not name.startswith("llama") or name == "llama-rope-llama3"]
)
def test_greedy_generation_is_that_of_transformers(name, tmp_path):
    """Prompts of unequal length in one batch, with the cache; windows shorter than the text."""
    model = open_model(write_folder(name, tmp_path))
    generations = generate(
        model.spec,
        load_params(model, None, jnp.float32),
        [prompt.tolist() for prompt in PROMPTS],
        max_new_tokens=NEW_TOKENS,
        stop_ids=(),
        dtype=jnp.float32,
    )
    assert [g.tokens for g in generations] == [tokens.tolist() for tokens in stored(name).generated]


def test_every_switch_matters():
    """The cases can fail: leaving any one thing out moves the logits far beyond the tolerance."""
    switches = {
        "llama-rope-llama3": {"rope_scaling": None},
        "llama-rope-linear": {"rope_scaling": None},
        "mistral-window": {"sliding_window": None},
        "qwen2-windows": {"max_window_layers": 2},
        "qwen3-windows": {"use_sliding_window": False},
        "llama": {"rope_theta": 101.0},
        "qwen3": {"rms_norm_eps": 2e-3},
        "gemma": {"hidden_act": "silu"},
        "gemma2": {"attn_logit_softcapping": None},
        "gemma3": {"rope_local_base_freq": 11.0},
        "gemma3-v5": {"final_logit_softcapping": None},
        "phi3": {"sliding_window": 6},
        "phi3-longrope": {"original_max_position_embeddings": 18},
        "olmo2": {"rope_scaling": {**CASES["olmo2"]["rope_scaling"], "attention_factor": 1.0}},
        "olmo3": {"rope_theta": 400_000.0},
        "granite": {"residual_multiplier": 0.601},
        "smollm3": {"no_rope_layer_interval": 3},
        "starcoder2": {"norm_epsilon": 2e-3},
        "mixtral": {"num_experts_per_tok": 3},
        "qwen3-moe": {"norm_topk_prob": False},
        "gpt-oss": {"swiglu_limit": 0.9},
    }
    for name, change in switches.items():
        with tempfile.TemporaryDirectory() as folder:
            model = open_model(write_folder(name, Path(folder), **change))
            params = load_params(model, None, jnp.float32)
        batch = _rows(ALONE)
        moved = decoder.logits(
            model.spec,
            {"params": params},
            batch["inputs"],
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
            dtype=jnp.float32,
        )[0, : len(TEXTS[0])]
        assert np.abs(moved - stored(name).logits[0]).max() > 100 * LOGITS, name
