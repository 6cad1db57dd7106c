"""The decoder with imported weights against transformers: logits, loss, every gradient.

The reference is stored (`tests/golden`, made by transformers); with torch it is also computed live
and the stored values are checked against it. docs/parity.md has the figures.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.cases import CASES, TEXTS, sampled, write_folder
from golden.make import reference, stored
from golden.ours import ALONE, GRADIENT, LOGITS, LOSS, PACKED, greedy, logits_tolerance, ours

from jaxtune.hf.load import load_params, open_model
from jaxtune.model import decoder

# All of a case in one worker, which compiles it once; training/test_meshes uses that program too.
WHOLE = {name: pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in CASES}


@pytest.mark.parametrize("name", WHOLE.values())
def test_against_stored_values(name):
    expected, found = stored(name), ours(name, PACKED)
    for want, got in zip(expected.logits, found.logits, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=logits_tolerance(name))
    assert found.loss == pytest.approx(expected.loss, abs=LOSS)
    assert found.gradients.keys() == expected.gradients.keys()
    for key, (largest, *places, squares) in expected.gradients.items():
        got = sampled(found.gradients[key])
        np.testing.assert_allclose(got[:-1], places, rtol=0, atol=GRADIENT * largest, err_msg=key)
        np.testing.assert_allclose(got[-1], squares, rtol=2 * GRADIENT, err_msg=key)


@pytest.mark.parametrize("name", WHOLE.values())
def test_packed_equals_alone(name):
    packed, alone = ours(name, PACKED), ours(name, ALONE)
    for a, b in zip(packed.logits, alone.logits, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    assert packed.loss == pytest.approx(alone.loss, abs=1e-6)
    for key, gradient in alone.gradients.items():
        atol = 1e-5 * np.abs(gradient).max()
        np.testing.assert_allclose(packed.gradients[key], gradient, 0, atol, err_msg=key)


@pytest.mark.torch
@pytest.mark.parametrize("name", WHOLE.values())
def test_against_transformers(name, tmp_path):
    pytest.importorskip("torch")
    expected, found = reference(write_folder(name, tmp_path)), ours(name, PACKED)
    for want, got in zip(expected.logits, found.logits, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=logits_tolerance(name))
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


@pytest.mark.parametrize("name", WHOLE.values())
def test_greedy_generation_is_that_of_transformers(name):
    """More prompts of unequal length than slots, with the cache; windows shorter than the text."""
    assert greedy(name) == [tokens.tolist() for tokens in stored(name).generated]


SWITCHES = {
    "llama-rope-llama3": {"rope_scaling": None},
    "llama-rope-linear": {"rope_scaling": None},
    "mistral-window": {"sliding_window": None},
    "qwen3-windows": {"use_sliding_window": False},
    "llama": {"rope_theta": 101.0},
    "qwen3": {"rms_norm_eps": 2e-3},
    "gemma": {"hidden_act": "silu"},
    "gemma2": {"attn_logit_softcapping": None},
    "gemma3": {"rope_local_base_freq": 11.0},
    "gemma3-v5": {"final_logit_softcapping": None},
    "phi3-longrope": {"original_max_position_embeddings": 18},
    "olmo2": {"rope_scaling": {**CASES["olmo2"]["rope_scaling"], "attention_factor": 1.0}},
    "olmo3": {"rope_theta": 400_000.0},
    "granite": {"residual_multiplier": 0.601},
    "smollm3": {"no_rope_layer_interval": 3},
    "ministral3": {
        "rope_parameters": {**CASES["ministral3"]["rope_parameters"], "llama_4_scaling_beta": 0.39}
    },
    "seed-oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 101.0}},
    "glm": {"partial_rotary_factor": 0.25},
    "glm4": {"partial_rotary_factor": 1.0},
    "exaone4": {"sliding_window": None},
    "mixtral": {"num_experts_per_tok": 3},
    "qwen3-moe": {"norm_topk_prob": False},
    "gpt-oss": {"swiglu_limit": 0.9},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_matters(name, tmp_path):
    """The cases can fail: leaving any one thing out moves the logits far beyond the tolerance."""
    model = open_model(write_folder(name, tmp_path, **SWITCHES[name]))
    inputs = jnp.asarray(TEXTS[0])[None]

    @jax.jit
    def run(params):
        return decoder.logits(
            model.spec,
            {"params": params},
            inputs,
            segment_ids=jnp.ones_like(inputs),
            positions=jnp.arange(inputs.shape[1])[None],
            dtype=jnp.float32,
            remat="none",
        )[0]

    moved = run(load_params(model, None, jnp.float32))
    assert np.abs(moved - stored(name).logits[0]).max() > 100 * LOGITS
