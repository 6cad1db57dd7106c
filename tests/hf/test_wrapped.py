"""The text half of a model of text and images: the same model as the text half alone."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from golden.cases import CASES, TEXTS, tensors, write_folder
from golden.make import stored

from jaxtune.config import ModelError
from jaxtune.hf.export import export_model
from jaxtune.hf.family.registry import family_of
from jaxtune.hf.load import load_params, open_model
from jaxtune.hf.peft import names, read, write
from jaxtune.hf.peft.targets import resolve_targets
from jaxtune.model import decoder
from jaxtune.model.lora import Lora
from jaxtune.tree import map_named, named

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


ADAPTED = Lora(r=3, alpha=6.0, rslora=True, dora=True, tokens=(9, 60))
_VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def _moved(name, leaf):
    random = np.random.RandomState(sum(map(ord, name)))
    return leaf + 0.05 * random.normal(size=leaf.shape).astype(np.float32)


def _adapters(model, lora):
    params = load_params(model, None, jnp.float32)
    fresh = decoder.init_adapters(model.spec, lora, params, jax.random.key(0))
    return map_named(_moved, fresh)


def _logits(model, collection=None, lora=None, text=TEXTS[1]):
    params = load_params(model, None, jnp.float32)
    return decoder.logits(
        model.spec,
        {"params": params} if collection is None else {"params": params, "lora": collection},
        jnp.asarray(text)[None],
        segment_ids=jnp.ones((1, len(text)), jnp.int32),
        positions=jnp.arange(len(text))[None],
        dtype=jnp.float32,
        lora=lora,
    )[0]


def _written(out, model, lora, collection):
    write.write_adapter(
        out, model=model, lora=lora, adapters=collection, tokenizer=None, template=None
    )
    return out


def _equal(collection, expected):
    found, expected = named(collection), named(expected)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


def _renamed(folder, out, begins):
    """The adapter as if its modules began otherwise, in tensors and patterns."""
    shutil.copytree(folder, out)
    values = safetensors.numpy.load_file(folder / names.WEIGHTS)
    for one, other in begins:
        one, other = names.PREFIX + one, names.PREFIX + other
        values = {
            other + name.removeprefix(one) if name.startswith(one) else name: value
            for name, value in values.items()
        }
    safetensors.numpy.save_file(values, out / names.WEIGHTS)
    return out


def test_an_adapter_has_the_names_of_the_whole_model(tmp_path):
    """Those of transformers 5; those of version 4 and of the text alone are read as well."""
    model = open_model(_write(tmp_path / "both", *V5))
    moved = _adapters(model, ADAPTED)
    folder = _written(tmp_path / "adapter", model, ADAPTED, moved)
    tensors = safetensors.numpy.load_file(folder / names.WEIGHTS)
    begins = ("base_model.model.model.language_model.", "base_model.model.lm_head.")
    assert {begin for name in tensors for begin in begins if name.startswith(begin)} == {*begins}
    assert all(name.startswith(begins) for name in tensors)
    said = json.loads((folder / names.CONFIG).read_text())
    assert len(said["target_modules"]) == 3 * 7
    assert all(name.startswith("model.language_model.layers.") for name in said["target_modules"])
    assert said["trainable_token_indices"] == {"embed_tokens": [9, 60], "lm_head": [9, 60]}
    card = (folder / "README.md").read_text()
    assert "on down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj;" in card

    whole, head = "model.language_model.", ("lm_head.", "language_model.lm_head.")
    older = _renamed(folder, tmp_path / "v4", ((whole, "language_model.model."), head))
    alone = _renamed(folder, tmp_path / "text", ((whole, "model."),))
    for each in (folder, older, alone):
        _, found = read.read_adapter(read.open_adapter(str(each)), model)
        _equal(found, moved)


def test_scales_go_by_the_names_in_the_file(tmp_path):
    model = open_model(_write(tmp_path / "both", *V5))
    lora = Lora(r=2, alpha=4.0)
    folder = _written(tmp_path / "adapter", model, lora, _adapters(model, lora))
    file = folder / names.CONFIG
    pattern = {"alpha_pattern": {r"model\.language_model\..*\.q_proj": 8.0}}
    plainly = read.read_adapter(read.open_adapter(str(folder)), model)[1]
    file.write_text(json.dumps({**json.loads(file.read_text()), **pattern}))
    scaled = read.read_adapter(read.open_adapter(str(folder)), model)[1]
    before, after = named(plainly), named(scaled)
    for name, values in after.items():
        twice = "/q/b" in name
        np.testing.assert_array_equal(values, before[name] * (2 if twice else 1), err_msg=name)


def test_targets_may_name_the_whole_model(tmp_path):
    model = open_model(_write(tmp_path / "both", *V5))
    expected = resolve_targets(model, "q_proj")
    assert resolve_targets(model, r"model\.language_model\..*\.q_proj") == expected
    assert resolve_targets(model, r"model\.layers\..*\.q_proj") == expected


def test_adapters_of_the_other_half_are_refused(tmp_path):
    model = open_model(_write(tmp_path / "both", *V5))
    lora = Lora(r=2, alpha=4.0)
    folder = _written(tmp_path / "adapter", model, lora, _adapters(model, lora))
    values = safetensors.numpy.load_file(folder / names.WEIGHTS)
    values["base_model.model.model.vision_tower.q_proj.lora_A.weight"] = np.zeros((2, 8))
    safetensors.numpy.save_file(values, folder / names.WEIGHTS)
    with pytest.raises(ModelError, match=r"vision_tower\.q_proj\.lora_A\.weight have no place in"):
        read.read_adapter(read.open_adapter(str(folder)), model)


def _gemma3(transformers):
    inner = {key: value for key, value in CASES["gemma3-v5"].items() if key not in OTHER}
    config = transformers.Gemma3Config(
        # Transformers caps the logits of the text alone, but not those of the whole model.
        text_config={**inner, "tie_word_embeddings": True, "final_logit_softcapping": None},
        vision_config=_VISION,
        mm_tokens_per_image=4,
        image_token_index=3,
        boi_token_index=4,
        eoi_token_index=5,
        tie_word_embeddings=False,
    )
    return "gemma3-v5", transformers.Gemma3ForConditionalGeneration(config)


def _mistral3(transformers):
    config = transformers.Mistral3Config(
        text_config=dict(CASES["ministral3"]),
        vision_config={**_VISION, "model_type": "pixtral", "head_dim": 4},
        image_token_index=3,
        tie_word_embeddings=False,
    )
    return "ministral3", transformers.Mistral3ForConditionalGeneration(config)


def _saved(whole, folder):
    """The whole model of transformers with the case's tensors as its text half, in `folder`."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.set_num_threads(1)
    case, theirs = whole(transformers)
    state = {
        f"model.language_model.{name.removeprefix('model.')}"
        if name.startswith("model.")
        else name: torch.tensor(value)
        for name, value in tensors(case).items()
    }
    unset, unknown = theirs.load_state_dict(state, strict=False)
    assert not unknown
    assert not [name for name in unset if "language_model" in name or "lm_head" in name]
    theirs.save_pretrained(folder)
    return type(theirs)


def _of_transformers(kind, folder):
    import torch

    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def _their_logits(model, text=TEXTS[1]):
    import torch

    with torch.no_grad():
        return model(torch.tensor(text)[None]).logits[0].numpy()


@pytest.mark.torch
@pytest.mark.parametrize("whole", [_gemma3, _mistral3])
def test_against_transformers(whole, tmp_path):
    kind = _saved(whole, tmp_path)
    notes = []
    model = open_model(tmp_path, note=notes.append)
    assert "of the other half" in notes[0]
    theirs = _their_logits(_of_transformers(kind, tmp_path))
    np.testing.assert_allclose(_logits(model), theirs, rtol=0, atol=2e-5)


@pytest.mark.torch
@pytest.mark.parametrize("whole", [_gemma3, _mistral3])
@pytest.mark.parametrize("lora", [Lora(r=3, alpha=6.0), ADAPTED], ids=["lora", "all"])
def test_peft_adapts_the_whole_model_by_ours(whole, lora, tmp_path):
    peft = pytest.importorskip("peft")
    kind = _saved(whole, tmp_path / "base")
    model = open_model(tmp_path / "base")
    moved = _adapters(model, lora)
    folder = _written(tmp_path / "adapter", model, lora, moved)
    adapted = peft.PeftModel.from_pretrained(_of_transformers(kind, tmp_path / "base"), folder)
    ours = _logits(model, moved, lora)
    np.testing.assert_allclose(_their_logits(adapted.eval()), ours, rtol=0, atol=1e-4)
    assert np.abs(ours - _logits(model)).max() > 0.1
    assert not [
        name for name, _ in adapted.named_parameters() if "vision" in name and "lora" in name
    ]


@pytest.mark.torch
@pytest.mark.parametrize("whole", [_gemma3, _mistral3])
def test_an_adapter_that_peft_made_of_the_whole_model(whole, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    kind = _saved(whole, tmp_path / "base")
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)",
        alpha_pattern={r"model\.language_model\.layers\.1\..*q_proj": 9},
        trainable_token_indices={"embed_tokens": [9, 60], "lm_head": [9, 60]},
    )
    adapted = peft.get_peft_model(_of_transformers(kind, tmp_path / "base"), config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for values in adapted.parameters():
            if values.requires_grad:
                values += 0.05 * torch.randn(values.shape)
    adapted.save_pretrained(tmp_path / "adapter")
    model = open_model(tmp_path / "base")
    adapter = read.open_adapter(str(tmp_path / "adapter"))
    assert adapter.base == str(tmp_path / "base")
    lora, collection = read.read_adapter(adapter, model)
    ours = _logits(model, collection, lora)
    np.testing.assert_allclose(ours, _their_logits(adapted), rtol=0, atol=1e-4)
    assert np.abs(ours - _logits(model)).max() > 0.1
