"""Folders opened and refused; parameters read by slices, the same on one device and on eight."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from golden.cases import CASES, tensors, write_folder

from jaxtune.config import ModelError
from jaxtune.hf import load
from jaxtune.hf.load import load_params, open_model
from jaxtune.model import decoder
from jaxtune.parallel import mesh as meshes
from jaxtune.tree import named

SHARDED = {"data": 1, "fsdp": 4, "tensor": 2, "context": 1}


@pytest.fixture
def folder(tmp_path):
    return write_folder("llama-biases", tmp_path / "model")


def _shardings(spec, sizes):
    mesh = meshes.make_mesh(sizes)
    return meshes.shardings(decoder.axes(spec), decoder.abstract(spec, jnp.float32), mesh)


def test_every_tensor_is_where_it_belongs(folder):
    model = open_model(folder)
    params = named(load_params(model, None, jnp.float32))
    source = tensors("llama-biases")
    assert params.keys() == named(decoder.abstract(model.spec, jnp.float32)).keys()
    q = source["model.layers.1.self_attn.q_proj.weight"].reshape(4, 8, 32)
    np.testing.assert_array_equal(
        params["stack_0/layer_0/attention/q/kernel"][1], q.transpose(2, 0, 1)
    )
    down = source["model.layers.0.mlp.down_proj.weight"]
    np.testing.assert_array_equal(params["stack_0/layer_0/mlp/down/kernel"][0], down.T)
    np.testing.assert_array_equal(params["head/kernel"], source["lm_head.weight"].T)


@pytest.mark.parametrize("name", ["llama-biases", "qwen3-windows"])
def test_eight_devices_hold_the_same_values_and_read_only_slices(name, tmp_path, monkeypatch):
    model = open_model(write_folder(name, tmp_path))
    whole = named(load_params(model, None, jnp.float32))
    read = {"bytes": 0, "largest": 0}

    def counted(tensor, index):
        values = fetch(tensor, index)
        read["bytes"] += values.nbytes
        read["largest"] = max(read["largest"], values.nbytes)
        return values

    fetch = load.fetch
    monkeypatch.setattr(load, "fetch", counted)
    shardings = _shardings(model.spec, SHARDED)
    params = named(load_params(model, shardings, jnp.float32))
    for parameter, values in params.items():
        assert values.sharding == named(shardings)[parameter]
        np.testing.assert_array_equal(np.asarray(values), np.asarray(whole[parameter]))

    # Every byte of the file once, however many devices hold it: slices that are replicated are
    # read once, and no slice reads beyond itself.
    assert read["bytes"] == sum(values.nbytes for values in tensors(name).values())
    largest = max(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) // leaf.shape[0] * 4
        if parameter.startswith("stack")
        else math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4
        for parameter, leaf in params.items()
    )
    assert read["largest"] == largest < max(v.nbytes for v in tensors(name).values())


def test_one_device_reads_its_share(folder, monkeypatch):
    """What a host of one device of eight would read: an eighth of what is sharded eight ways."""
    model = open_model(folder)
    shardings = named(_shardings(model.spec, SHARDED))
    kernel = "stack_0/layer_0/mlp/gate/kernel"
    placed = model.placed[kernel]
    index = next(iter(shardings[kernel].devices_indices_map(placed.shape).values()))
    read = []

    def fetch(name, at):
        values = load.fetch(model.tensors[name], at)
        read.append(values.size)
        return values

    placed.read(fetch, index, np.dtype(np.float32))
    assert sum(read) == math.prod(placed.shape) // 8


def test_values_shared_by_devices_survive_donation(folder):
    model = open_model(folder)
    shardings = _shardings(model.spec, {"data": 8, "fsdp": 1, "tensor": 1, "context": 1})
    params = load_params(model, shardings, jnp.float32)
    expected = jax.tree.map(np.array, load_params(model, None, jnp.float32))
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)
    doubled = update(update(params))
    for name, values in named(doubled).items():
        for shard in values.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), 4 * named(expected)[name])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_the_dtype_is_cast_on_read(folder, dtype):
    source = {name: values.astype(dtype) for name, values in tensors("llama-biases").items()}
    safetensors.numpy.save_file(source, folder / "model.safetensors")
    model = open_model(folder)
    assert model.tensors["lm_head.weight"].dtype == dtype
    params = named(load_params(model, None, jnp.float32))
    assert all(values.dtype == jnp.float32 for values in params.values())
    np.testing.assert_array_equal(params["head/kernel"], source["lm_head.weight"].T)
    params = named(load_params(model, None, dtype))
    assert all(values.dtype == dtype for values in params.values())


def test_dtype_is_what_is_stated_or_what_most_values_have(folder):
    assert open_model(folder).dtype == "float32"
    config = json.loads((folder / "config.json").read_text())
    del config["torch_dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    source = tensors("llama-biases")
    source = {k: v if "norm" in k else v.astype(ml_dtypes.bfloat16) for k, v in source.items()}
    safetensors.numpy.save_file(source, folder / "model.safetensors")
    assert open_model(folder).dtype == "bfloat16"
    assert open_model(folder, weights=False).dtype == "float32"


def _rewrite(folder, change):
    source = tensors("llama-biases")
    change(source)
    safetensors.numpy.save_file(source, folder / "model.safetensors")


def test_every_tensor_is_accounted_for(folder):
    def change(source):
        del source["model.layers.1.mlp.up_proj.weight"]
        source["model.layers.0.self_attn.q_norm.weight"] = np.zeros(8, np.float32)
        source["model.norm.weight"] = np.zeros(31, np.float32)

    _rewrite(folder, change)
    with pytest.raises(ModelError) as error:
        open_model(folder)
    assert "1 tensor missing for family 'llama': model.layers.1.mlp.up_proj.weight" in str(
        error.value
    )
    assert (
        "1 tensor without a row in family 'llama': model.layers.0.self_attn.q_norm.weight"
        in str(error.value)
    )
    assert "model.norm.weight is [31], config.json says [32]" in str(error.value)


def test_many_faults_are_counted(folder):
    _rewrite(folder, lambda source: [source.pop(name) for name in list(source) if "mlp" in name])
    with pytest.raises(ModelError, match=r"12 tensors missing for family 'llama': .* and 8 more"):
        open_model(folder)


def test_a_dtype_that_cannot_be_read_is_said_when_opening(folder):
    def change(source):
        source["model.norm.weight"] = np.zeros(32, np.int32)

    _rewrite(folder, change)
    with pytest.raises(ModelError, match="holds I32 values"):
        open_model(folder)


def test_derived_tensors_are_ignored(tmp_path):
    folder = write_folder("qwen3", tmp_path)
    source = tensors("qwen3")
    source["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    source["lm_head.weight"] = source["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(source, folder / "model.safetensors")
    assert "head/kernel" not in named(load_params(open_model(folder), None, jnp.float32))


def test_random_needs_only_the_config(folder):
    (folder / "model.safetensors").unlink()
    model = open_model(folder, weights=False)
    assert model.spec == open_model(folder / "config.json", weights=False).spec
    with pytest.raises(ModelError, match="was opened without weights"):
        load_params(model, None, jnp.float32)
    with pytest.raises(ModelError, match=r"no weights: expected model.safetensors"):
        open_model(folder)


def test_a_run_directory_means_its_export(folder, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"a run directory without .*python -m jaxtune.convert"):
        open_model(run)
    shutil.copytree(folder, run / "hf")
    assert open_model(run).folder == run / "hf"


def test_bad_folders_are_refused(folder, tmp_path):
    with pytest.raises(
        ModelError, match=r"no config.json there. Expected a folder in Hugging Face"
    ):
        open_model(tmp_path)
    config = folder / "config.json"
    good = json.loads(config.read_text())
    config.write_text("{")
    with pytest.raises(ModelError, match=r"config.json: not readable as JSON"):
        open_model(folder)
    config.write_text("[]")
    with pytest.raises(ModelError, match="expected a JSON object; got a list"):
        open_model(folder)
    config.write_text(json.dumps({**good, "model_type": "qwen"}))
    with pytest.raises(ModelError, match=r"model_type 'qwen' is unknown.*Did you mean 'qwen"):
        open_model(folder)
    config.write_text(json.dumps(good))
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config.json: not readable as JSON"):
        open_model(folder)  # now, not when an hour of training is to be written out
    config.write_text(json.dumps({**good, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match="weights quantised by gptq are not supported"):
        open_model(folder)


def test_all_cases_open(tmp_path):
    for name in CASES:
        model = open_model(write_folder(name, tmp_path / name))
        assert len(model.spec.layers) == CASES[name]["num_hidden_layers"]
