"""The text half of a model of text and images: the same model as the text half alone."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from golden.cases import CASES, TEXTS, tensors, write_folder
from golden.make import stored

from jaxtune.config import ModelError
from jaxtune.hf.export import export_model
from jaxtune.hf.families import family_of
from jaxtune.hf.load import load_params, open_model
from jaxtune.model import decoder

OTHER = {"dtype", "eos_token_id", "tie_word_embeddings"}


def _write(folder, prefixes, others):
    """The case gemma3-v5 as the text half: its tensors renamed, others beside them."""
    folder.mkdir()
    config = CASES["gemma3-v5"]
    inner = {key: value for key, value in config.items() if key not in OTHER}
    outer = {key: value for key, value in config.items() if key in OTHER}
    outer |= {"model_type": "gemma3", "text_config": inner, "vision_config": {"hidden_size": 8}}
    (folder / "config.json").write_text(json.dumps(outer))
    values = dict.fromkeys(others, np.zeros(3, np.float32))
    for name, value in tensors("gemma3-v5").items():
        own, inside = next((own, inside) for own, inside in prefixes if name.startswith(own))
        values[inside + name.removeprefix(own)] = value
    safetensors.numpy.save_file(values, folder / "model.safetensors")
    return folder


V4 = ((("", "language_model."),), ("vision_tower.a.weight", "multi_modal_projector.w"))
V5 = (
    (("model.", "model.language_model."), ("lm_head.", "lm_head.")),
    ("model.vision_tower.a.weight", "model.multi_modal_projector.w"),
)


@pytest.mark.parametrize("style", [V4, V5], ids=["v4", "v5"])
def test_the_text_half_is_the_model_of_text(style, tmp_path):
    notes = []
    model = open_model(_write(tmp_path / "both", *style), note=notes.append)
    alone = open_model(write_folder("gemma3-v5", tmp_path / "alone"))
    assert model.spec == alone.spec
    assert model.family is alone.family
    (note,) = notes
    assert "2 tensors of the other half" in note
    assert all(name in note for name in style[1])

    params = load_params(model, None, jnp.float32)
    export_model(
        tmp_path / "out", model=model, params=params, tokenizer=None, template=None, card=""
    )
    out = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    source = tensors("gemma3-v5")
    assert out.keys() == source.keys()
    assert all(out[name].tobytes() == source[name].tobytes() for name in out)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert config["eos_token_id"] == 2
    assert open_model(tmp_path / "out").spec == model.spec


@pytest.mark.parametrize("case", ["llama-head-dim", "ministral3"])
def test_the_text_half_says_which_family_it_is(case, tmp_path):
    """Mistral Small 3.1 names no other; Ministral 3 is its successor in the same wrapping."""
    inner = {key: value for key, value in CASES[case].items() if key != "model_type"}
    kind = "mistral"
    if case == "ministral3":
        kind = inner["model_type"] = case
    outer = {"model_type": "mistral3", "text_config": {**inner, "sliding_window": None}}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    safetensors.numpy.save_file(
        {
            "vision_tower.a.weight": np.zeros(3, np.float32),
            **{f"language_model.{name}": value for name, value in tensors(case).items()},
        },
        tmp_path / "model.safetensors",
    )
    model = open_model(tmp_path)
    assert model.family is family_of({"model_type": kind})
    params = load_params(model, None, jnp.float32)
    text = jnp.asarray(TEXTS[0])[None]
    logits = decoder.logits(
        model.spec,
        {"params": params},
        text,
        segment_ids=jnp.ones_like(text),
        positions=jnp.arange(text.shape[1])[None],
        dtype=jnp.float32,
    )[0]
    np.testing.assert_allclose(logits, stored(case).logits[0], rtol=0, atol=2e-5)


def test_what_is_neither_half_is_an_error(tmp_path):
    with pytest.raises(ModelError, match=r"1 tensor without a row .*'gemma3_text': audio\.w"):
        open_model(_write(tmp_path / "extra", V4[0], ("audio.w",)))
    folder = _write(tmp_path / "twice", V4[0], ("lm_head.weight",))
    with pytest.raises(ModelError, match=r"holds the tensor lm_head\.weight twice, under"):
        open_model(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3"}))
    with pytest.raises(ModelError, match="no 'text_config' in a config of model_type 'gemma3'"):
        open_model(folder)


@pytest.mark.torch
def test_against_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    inner = {key: value for key, value in CASES["gemma3-v5"].items() if key not in OTHER}
    config = transformers.Gemma3Config(
        text_config={**inner, "tie_word_embeddings": True},
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=3,
        boi_token_index=4,
        eoi_token_index=5,
        tie_word_embeddings=False,
    )
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    state = {
        f"model.language_model.{name.removeprefix('model.')}"
        if name.startswith("model.")
        else name: torch.tensor(value)
        for name, value in tensors("gemma3-v5").items()
    }
    unset, unknown = theirs.load_state_dict(state, strict=False)
    assert not unknown
    assert not [name for name in unset if "language_model" in name or "lm_head" in name]
    theirs.save_pretrained(tmp_path)

    notes = []
    model = open_model(tmp_path, note=notes.append)
    assert "vision_tower" in notes[0]
    text = TEXTS[1]
    logits = decoder.logits(
        model.spec,
        {"params": load_params(model, None, jnp.float32)},
        jnp.asarray(text)[None],
        segment_ids=jnp.ones((1, len(text)), jnp.int32),
        positions=jnp.arange(len(text))[None],
        dtype=jnp.float32,
    )[0]
    np.testing.assert_allclose(logits, stored("gemma3-v5").logits[1], rtol=0, atol=2e-5)
