"""Checkpoints of mixtures of experts: the same bytes out as in, and packed ones read."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden.cases import tensors, write_folder
from safetensors.numpy import load_file, save_file

from jaxtune.config import ModelError
from jaxtune.hf.export import WeightFormat, export_model
from jaxtune.hf.load import load_params, open_model
from jaxtune.hf.mxfp4 import fetch
from jaxtune.model import decoder
from jaxtune.parallel import mesh as meshes
from jaxtune.tree import named

PACKED = ("gate_up_proj", "down_proj")
QUANTISED = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def _export(model, out, **options):
    params = load_params(model, None, options.pop("dtype", jnp.float32))
    options = {"tokenizer": None, "template": None, "card": "# A model\n", **options}
    return export_model(out, model=model, params=params, **options)


def _bytes(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return {name: (str(v.dtype), v.shape, v.tobytes()) for name, v in found.items()}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "gpt-oss"])
def test_import_then_export_changes_no_byte(name, sharded, tmp_path):
    source = write_folder(name, tmp_path / "source")
    if sharded:
        values = {key: value.astype(ml_dtypes.bfloat16) for key, value in tensors(name).items()}
        save_file(values, source / "model.safetensors")
    out = tmp_path / "out"
    result = _export(
        open_model(source), out, weights=WeightFormat(max_shard_bytes=9_000 if sharded else 10**9)
    )
    assert _bytes(out) == _bytes(source)
    assert (len(result.files) > 1) is sharded


def _both_folders(tmp_path):
    """One model twice: its experts as MXFP4, and as the bfloat16 values those stand for."""
    keys = {"intermediate_size": 64, "torch_dtype": "bfloat16", "num_hidden_layers": 2}
    plain = write_folder("gpt-oss", tmp_path / "plain", **keys)
    shapes = {"gate_up_proj": (4, 128, 1), "down_proj": (4, 32, 2)}  # E, outputs, groups of 32
    rng = np.random.default_rng(0)
    packed = {}
    for name, value in load_file(plain / "model.safetensors").items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        kind = name.rpartition(".")[2]
        if layer >= 2:
            continue
        if kind in PACKED:
            E, R, G = shapes[kind]
            packed[f"{name}_blocks"] = rng.integers(0, 256, (E, R, G, 16)).astype(np.uint8)
            packed[f"{name}_scales"] = rng.integers(120, 126, (E, R, G)).astype(np.uint8)
        elif kind == "gate_up_proj_bias":
            packed[name] = rng.normal(size=(4, 128)).astype(ml_dtypes.bfloat16)
        else:
            packed[name] = value.astype(ml_dtypes.bfloat16)
    source = tmp_path / "packed"
    source.mkdir()
    config = json.loads((plain / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTISED}))
    save_file(packed, source / "model.safetensors")
    model = open_model(source)
    whole = {
        name: fetch(tensor, tuple(slice(0, n) for n in tensor.shape))
        for name, tensor in model.tensors.items()
    }
    save_file({n: np.ascontiguousarray(v) for n, v in whole.items()}, plain / "model.safetensors")
    return model, source, plain


def test_packed_experts_are_the_model_they_stand_for(tmp_path):
    packed, _, plain = _both_folders(tmp_path)
    mesh = meshes.make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    abstract = decoder.abstract(packed.spec, jnp.float32)
    shardings = meshes.shardings(decoder.axes(packed.spec), abstract, mesh)
    expected = named(load_params(open_model(plain), None, jnp.float32))
    for where in (None, shardings):
        for name, value in named(load_params(packed, where, jnp.float32)).items():
            np.testing.assert_array_equal(np.asarray(value), expected[name], err_msg=name)
    assert packed.dtype == "bfloat16"

    _export(packed, tmp_path / "out", dtype=jnp.bfloat16)
    assert _bytes(tmp_path / "out") == _bytes(plain)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert open_model(tmp_path / "out").spec == packed.spec


@pytest.mark.torch
def test_transformers_reads_the_packed_folder_alike(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, Mxfp4Config

    model, source, _ = _both_folders(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    found = dict(theirs.named_parameters())
    for name, tensor in model.tensors.items():
        ours = fetch(tensor, tuple(slice(0, n) for n in tensor.shape))
        want = found[name].detach().to(torch.bfloat16).view(torch.int16).numpy()
        np.testing.assert_array_equal(np.ascontiguousarray(ours).view(np.int16), want, name)


def test_faults_of_packed_folders(tmp_path):
    _, source, _ = _both_folders(tmp_path)
    values = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    save_file({k: v for k, v in values.items() if k != name}, source / "model.safetensors")
    with pytest.raises(ModelError, match=r"down_proj_blocks has no .*down_proj_scales"):
        open_model(source)
    save_file(values, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="4 tensors missing for family 'gpt_oss'"):
        open_model(source)


def test_experts_are_read_by_the_device_that_holds_them(tmp_path):
    """A device with half of the width asks each expert for that half alone."""
    model = open_model(write_folder("mixtral", tmp_path))
    placed = model.placed["stack_0/layer_0/moe/down/kernel"]  # [L E F D], files [D F]
    seen = []

    def counted(name, index):
        seen.append((name, index[1]))
        return fetch(model.tensors[name], index)

    index = (slice(0, 2), slice(1, 3), slice(24, 48), slice(0, 32))
    placed.read(counted, index, np.dtype(np.float32))
    names = [
        f"model.layers.{n}.block_sparse_moe.experts.{e}.w2.weight" for n in (0, 1) for e in (1, 2)
    ]
    assert sorted(seen, key=str) == [(name, slice(24, 48)) for name in names]
