"""config.json in every spelling -> the same spec; what cannot be represented is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from golden.cases import CASES, TEXTS, write_folder

from jaxtune.config import ModelError
from jaxtune.hf.family.registry import FAMILIES, config_dtype, family_of, stacked
from jaxtune.hf.load import load_params, open_model
from jaxtune.model import decoder
from jaxtune.spec import LayerSpec, Stack

LLAMA = CASES["llama"]


def _spec(config):
    return family_of(config).to_spec(config)


def _layer(window: int | None = None) -> LayerSpec:
    return LayerSpec(4, 2, 8, 16, None, window)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("aaaa", [("a", 4)]),
        ("aaabb", [("a", 3), ("b", 2)]),
        ("abab", [("ab", 2)]),
        ("ababa", [("ab", 2), ("a", 1)]),
        ("aaaaab" * 10 + "aa", [("aaaaab", 10), ("a", 2)]),  # Gemma 3
        ("a" + "b" * 26, [("a", 1), ("b", 26)]),  # one dense layer, then experts
        ("abc", [("a", 1), ("b", 1), ("c", 1)]),
    ],
)
def test_layers_become_the_fewest_compiled_stacks(pattern, expected):
    layers = {letter: _layer(window) for window, letter in enumerate("abc", start=1)}
    stacks = stacked([layers[letter] for letter in pattern])
    text = [("".join("abc"[x.window - 1] for x in s.pattern), s.repeats) for s in stacks]
    flat = "".join(letters * repeats for letters, repeats in text)
    assert flat == pattern
    assert sum(len(letters) for letters, _ in text) == sum(len(letters) for letters, _ in expected)
    assert len(text) <= len(expected)


@pytest.mark.parametrize("name", CASES)
def test_the_exported_config_means_the_same(name):
    config = CASES[name]
    family, spec = family_of(config), _spec(config)
    out = family.to_hf_config(config, spec, dtype="bfloat16")
    assert _spec(out) == spec
    assert config.keys() <= out.keys()
    assert config_dtype(out) == "bfloat16"
    # Either half alone is complete: version 4 reads the first, version 5 the second.
    v5_only = ("rope_parameters", "dtype")
    v4_only = ("rope_theta", "rope_scaling", "torch_dtype")
    for left_out in (v5_only, v4_only):
        assert _spec({key: value for key, value in out.items() if key not in left_out}) == spec


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_the_exported_config_alike(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers.LlamaConfig(), "rope_parameters"):
        pytest.skip("transformers 4 states rope otherwise")
    config = CASES[name]
    out = family_of(config).to_hf_config(config, _spec(config), dtype="float32")
    for file, content in (("in", config), ("out", out)):
        (tmp_path / file).mkdir()
        (tmp_path / file / "config.json").write_text(json.dumps(content))
    before, after = (
        transformers.AutoConfig.from_pretrained(tmp_path / file).to_dict() for file in ("in", "out")
    )
    for key in ("architectures", "_name_or_path"):
        before[key] = after[key]
    for rope in (before["rope_parameters"], after["rope_parameters"]):
        rope.pop("type", None)
    after = {key: value for key, value in after.items() if key in before}
    assert after == before


def test_both_key_styles_are_one_model():
    assert _spec(CASES["llama-rope-llama3"]) == _spec(CASES["llama-v5-rope-llama3"])
    assert _spec(CASES["llama"]) == _spec(
        {**LLAMA, "rope_theta": None, "rope_parameters": {"rope_theta": 100.0, "type": "default"}}
    )
    assert config_dtype({"torch_dtype": "bfloat16"}) == config_dtype({"dtype": "bfloat16"})
    assert config_dtype({"torch_dtype": "torch.float16"}) == "float16"
    assert config_dtype({}) is None
    with pytest.raises(ModelError, match="dtype 'int8'; expected one of float32"):
        config_dtype({"dtype": "int8"})


def test_absent_keys_have_the_values_of_transformers():
    transformers = pytest.importorskip("transformers")
    defaults = {
        "num_key_value_heads": "kv_heads",
        "sliding_window": "window",
    }
    for kind, family in FAMILIES.items():
        theirs = transformers.AutoConfig.for_model(kind)
        for key, value in family.defaults.items():
            if key == "sliding_window" and kind.startswith("qwen"):
                continue  # transformers forgets it unless use_sliding_window is set
            private = getattr(theirs, f"_{key}", None)  # of Gemma 3
            stated = getattr(theirs, key, private)
            if key == "rope_parameters":  # theirs has the base too
                stated = {name: stated[name] for name in value}
            if key == "partial_rotary_factor" and stated is None:
                stated = theirs.rope_parameters[key]
            assert stated == value, (kind, key)
        small = {"vocab_size": 9, "hidden_size": 512, "intermediate_size": 8, "model_type": kind}
        config = {**small, "num_hidden_layers": 2, "num_attention_heads": 32}
        theirs, layer = transformers.AutoConfig.for_model(**config), _spec(config).layers[0]
        for key, name in defaults.items():
            stated = getattr(theirs, key, None) or None  # Qwen2 MoE has 0 for no window
            assert stated == getattr(layer, name), (kind, key)
        assert layer.head_dim == (getattr(theirs, "head_dim", None) or 512 // 32)
        ropes = theirs.rope_parameters
        rope = ropes.get("sliding_attention", ropes)  # the first layer slides where some do
        assert layer.rope.theta == rope["rope_theta"], kind
        assert _spec(config).tie_head is theirs.tie_word_embeddings, kind
        norm_eps = getattr(theirs, "rms_norm_eps", None) or theirs.norm_epsilon
        assert _spec(config).norm_eps == norm_eps, kind
        assert _spec(config).init_scale == theirs.initializer_range, kind


def test_which_layers_are_mixtures():
    """As transformers 5 decides it, in `Qwen3MoeDecoderLayer.__init__`."""
    base = {**CASES["qwen3-moe"], "num_hidden_layers": 6}

    def sparse(**keys):
        return [n for n, layer in enumerate(_spec({**base, **keys}).layers) if layer.moe]

    assert sparse(decoder_sparse_step=1) == [0, 1, 2, 3, 4, 5]
    assert sparse(decoder_sparse_step=2) == [1, 3, 5]
    assert sparse(decoder_sparse_step=2, mlp_only_layers=[0, 3]) == [1, 5]
    widths = [layer.mlp_width for layer in _spec(base).layers]
    assert widths == [48, 16, 48, 16, 48, 16]
    windows = _spec({**CASES["qwen2-moe"], "num_hidden_layers": 4, "max_window_layers": 2}).layers
    assert [layer.window for layer in windows] == [4, None, None, None]


def test_the_routers_loss_counts_where_the_config_asks_for_it():
    for name in ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "gpt-oss"):
        config = {**CASES[name], "router_aux_loss_coef": 0.03}
        for asked in (False, True):
            spec = _spec({**config, "output_router_logits": asked})
            found = {layer.moe.aux_coef for layer in spec.layers if layer.moe}
            assert found == ({0.03} if asked else {0.0})


def test_windows_of_qwen():
    base = {**CASES["qwen2-windows"], "num_hidden_layers": 4, "max_window_layers": 3}
    windows = [layer.window for layer in _spec(base).layers]
    assert windows == [None, None, None, 4]
    assert _spec({**base, "use_sliding_window": False}).stacks == (
        Stack((_spec(base).layers[0],), 4),
    )
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    windows = [layer.window for layer in _spec({**base, "layer_types": kinds}).layers]
    assert windows == [4, None, None, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "here.json: 'hidden_size' is None; expected a positive integer"),
        ({"vocab_size": "61"}, "'vocab_size' is '61'; expected a positive integer"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' is 0"),
        ({"rms_norm_eps": "small"}, "'rms_norm_eps' is 'small'; expected a number"),
        ({"hidden_act": "swiglu"}, "hidden_act 'swiglu' is not supported; supported are silu"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope type 'dynamic' is not supported; supported are default, linear, llama3, yarn",
        ),
        (
            {"rope_scaling": {"rope_type": "longrope", "long_factor": [1, "2"]}},
            "'short_factor' is None; expected a list of numbers",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "'factor' is None; expected a number"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope settings that differ by layer type are unknown in this family",
        ),
        ({"rope_scaling": [1]}, "here.json: "),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ],
)
def test_what_cannot_be_represented_is_refused(change, message):
    config = {**LLAMA, **change}
    with pytest.raises(ModelError, match=message):
        family_of(config).to_spec(config, where="here.json")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gemma", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' is True"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' is 50.0, which is"),
        (
            "gemma3",
            {"rope_parameters": {"chunked_attention": {"rope_type": "default"}}},
            "rope_parameters has 'chunked_attention'; expected settings of full_attention",
        ),
        (
            "ministral3",
            {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.4}},
            "'original_max_position_embeddings' is None; expected a positive integer",
        ),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers names 1 of 3 layers"),
        ("granite", {"logits_scaling": 0.0}, "float division by zero"),
        (
            "phi3-longrope",
            {"partial_rotary_factor": 1.0},
            "rope has 2 short_factors; 8 rotated features need 4",
        ),
    ],
)
def test_what_a_family_cannot_be_is_refused(name, change, message):
    with pytest.raises(ModelError, match=message):
        _spec({**CASES[name], **change})


def test_ropes_by_type_of_layer():
    full, sliding = (_spec(CASES["gemma3"]).layers[n].rope for n in (2, 0))
    assert (full.theta, full.scaling, full.factor) == (100.0, "linear", 2.5)
    assert (sliding.theta, sliding.scaling) == (10.0, "none")
    named = {"type": "linear", "factor": 2.5}  # as older files call it
    assert _spec({**CASES["gemma3"], "rope_scaling": named}) == _spec(CASES["gemma3"])


_GROWING = {"llama_4_scaling_beta": 0.4, "original_max_position_embeddings": 4, "factor": 2.5}
_FLAT = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ROPES = {
    "grows-default": ("ministral3", {**_GROWING, "rope_type": "default", "rope_theta": 100.0}),
    "grows-linear": ("ministral3", {**_GROWING, "rope_type": "linear", "rope_theta": 100.0}),
    "olmo3-flat": ("olmo3", {**_FLAT, "rope_theta": 100.0}),
    "gemma3-flat": ("gemma3-v5", _FLAT),
}


def test_queries_grow_by_the_length_that_the_rope_states():
    for key in ("grows-default", "grows-linear"):
        name, rope = ROPES[key]
        (found,) = {layer.rope for layer in _spec({**CASES[name], "rope_parameters": rope}).layers}
        assert (found.growth, found.original_max_positions) == (0.4, 4)


def test_settings_beside_those_by_type_do_nothing():
    for key in ("olmo3-flat", "gemma3-flat"):
        name, rope = ROPES[key]
        config = {k: v for k, v in CASES[name].items() if not k.startswith("rope_")}
        assert _spec({**config, "rope_parameters": rope}) == _spec(config)


@pytest.mark.torch
@pytest.mark.parametrize("key", ROPES)
def test_ropes_against_transformers(key, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    name, rope = ROPES[key]
    config = {k: v for k, v in CASES[name].items() if not k.startswith("rope_")}
    folder = write_folder(name, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = theirs(torch.tensor(TEXTS[0])[None]).logits[0].numpy()
    model = open_model(folder)
    text = jnp.asarray(TEXTS[0])[None]
    found = decoder.logits(
        model.spec,
        {"params": load_params(model, None, jnp.float32)},
        text,
        segment_ids=jnp.ones_like(text),
        positions=jnp.arange(text.shape[1])[None],
        dtype=jnp.float32,
    )[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_longrope_by_its_earlier_names(name):
    config = CASES["phi3-longrope"]
    spec = _spec({**config, "rope_scaling": {**config["rope_scaling"], "type": name}})
    assert spec == _spec(config)
    out = family_of(config).to_hf_config(config, spec, dtype="float32")
    # Version 4 wants these three keys and no other.
    assert out["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}
    assert out["rope_scaling"]["type"] == out["rope_parameters"]["rope_type"] == "longrope"


def test_layer_types_are_checked():
    config = {**CASES["qwen3-windows"], "layer_types": ["full_attention"] * 4}
    with pytest.raises(ModelError, match="layer_types names 4 layers; num_hidden_layers is 5"):
        _spec(config)
    with pytest.raises(ModelError, match="layer_types has 'chunked_attention'"):
        _spec({**config, "layer_types": ["chunked_attention"] * 5})


def test_an_unknown_family_names_the_nearest():
    with pytest.raises(ModelError, match=r"model_type 'lama' is unknown; .*Did you mean 'llama'\?"):
        family_of({"model_type": "lama"}, where="config.json")
    with pytest.raises(ModelError, match="no 'model_type'; expected one of llama, mistral"):
        family_of({})
