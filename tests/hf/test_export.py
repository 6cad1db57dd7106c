"""What is exported is what was imported, what transformers loads, and never half of it."""

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from golden.cases import CASES, TEXTS, tensors, write_folder, write_tokenizer
from golden.make import stored

from jaxtune.config import ConfigError
from jaxtune.data.schema import Message
from jaxtune.data.templating.masking import render_prompt
from jaxtune.data.templating.template import resolve
from jaxtune.data.tokenizer import load_tokenizer
from jaxtune.hf import export, layout
from jaxtune.hf import tensors as safetensors_io
from jaxtune.hf.export import WeightFormat, check_target, export_model
from jaxtune.hf.load import load_params, open_model
from jaxtune.hf.tensors import open_tensors
from jaxtune.model import decoder
from jaxtune.parallel import mesh as meshes
from jaxtune.tree import map_named

CARD = "---\nlibrary_name: transformers\n---\n# A model\n"
JINJA = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Tokenizer(NamedTuple):
    folder: Path
    bos_id: int | None = 1
    eos_id: int | None = 2
    pad_id: int | None = 0
    bos_token: str | None = "<s>"
    eos_token: str | None = "</s>"
    changed_files: Mapping[str, bytes] = {}


class Template(NamedTuple):
    exported: Mapping[str, str] = {"default": JINJA}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A tiny byte-level BPE with an old template in its config, as older exports have it."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template="{{ 'old' }}")


def _export(model, out, params=None, **options):
    options = {"tokenizer": None, "template": None, "card": CARD, **options}
    params = load_params(model, None, jnp.float32) if params is None else params
    return export_model(out, model=model, params=params, **options)


def _bytes(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(safetensors.numpy.load_file(file))
    return {name: (str(v.dtype), v.shape, v.tobytes()) for name, v in found.items()}


ROUND_TRIPS = [
    *((name, False, np.float32) for name in CASES),
    *((name, True, ml_dtypes.bfloat16) for name in CASES),
    ("llama-biases", False, np.float16),
    ("qwen3-windows", True, np.float16),
    ("llama-v5-tied", False, ml_dtypes.bfloat16),
    ("qwen2-tied", True, np.float32),
]


@pytest.mark.parametrize(("name", "sharded", "dtype"), ROUND_TRIPS)
def test_import_then_export_changes_no_byte(name, sharded, dtype, tmp_path):
    source = write_folder(name, tmp_path / "source")
    values = {key: value.astype(dtype) for key, value in tensors(name).items()}
    if sharded:
        (source / "model.safetensors").unlink()
        names, files = sorted(values), {}
        for i, part in enumerate((names[::2], names[1::2]), start=1):
            file = f"model-{i:05d}-of-00002.safetensors"
            safetensors.numpy.save_file({key: values[key] for key in part}, source / file)
            files.update(dict.fromkeys(part, file))
        index = {"metadata": {}, "weight_map": files}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        safetensors.numpy.save_file(values, source / "model.safetensors")

    out = tmp_path / "out"
    result = _export(
        open_model(source), out, weights=WeightFormat(max_shard_bytes=20_000 if sharded else 10**9)
    )
    assert _bytes(out) == _bytes(source)
    assert result.tensors == len(values)
    assert result.size == sum(value.nbytes for value in values.values())
    assert sorted(result.files) == sorted(path.name for path in out.glob("*.safetensors"))
    assert (len(result.files) > 1) is sharded is (out / "model.safetensors.index.json").exists()
    if sharded:
        assert all((out / file).stat().st_size < 26_000 for file in result.files)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == result.size
        assert index["weight_map"].keys() == values.keys()


def test_mixed_dtypes_stay_mixed_and_save_dtype_overrules(tmp_path):
    source = write_folder("llama", tmp_path / "source", torch_dtype="bfloat16")
    values = {
        name: value if "norm" in name else value.astype(ml_dtypes.bfloat16)
        for name, value in tensors("llama").items()
    }
    safetensors.numpy.save_file(values, source / "model.safetensors")
    model = open_model(source)
    _export(model, tmp_path / "same")
    assert _bytes(tmp_path / "same") == _bytes(source)
    assert json.loads((tmp_path / "same" / "config.json").read_text())["dtype"] == "bfloat16"

    _export(model, tmp_path / "half", weights=WeightFormat("float16"))
    assert {dtype for dtype, *_ in _bytes(tmp_path / "half").values()} == {"float16"}
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float16"
    with pytest.raises(ConfigError, match="save_dtype 'int8'; expected source, float32"):
        _export(model, tmp_path / "int8", weights=WeightFormat("int8"))


def test_random_weights_are_saved_as_the_config_says_or_float32(tmp_path):
    model = open_model(write_folder("llama", tmp_path / "source"), weights=False)
    params = map_named(lambda _, leaf: jnp.ones(leaf.shape), decoder.abstract(model.spec, "f4"))
    for stated in ("bfloat16", None):
        source = write_folder("llama", tmp_path / "source", torch_dtype=stated)
        model = open_model(source, weights=False)
        out = tmp_path / str(stated)
        _export(model, out, params)
        assert {dtype for dtype, *_ in _bytes(out).values()} == {stated or "float32"}
        assert list(open_tensors(out))[:2] == ["lm_head.weight", "model.embed_tokens.weight"]


def test_a_value_too_large_for_float16_is_refused(tmp_path):
    model = open_model(write_folder("llama", tmp_path / "source"))
    params = load_params(model, None, jnp.float32)
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(1e5)
    with pytest.raises(
        ConfigError, match=r"model.norm.weight: has a value of 1e\+05, which float16"
    ):
        _export(model, tmp_path / "out", params, weights=WeightFormat("float16"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(
    ("name", "block"), [("llama-biases", 1 << 20), ("qwen3-windows", 100), ("llama-biases", 7)]
)
def test_sharded_parameters_are_gathered(name, block, on_device, tmp_path, monkeypatch):
    """Also in blocks smaller than a row, and cut out on the device as where memory is apart."""
    monkeypatch.setattr(layout, "BLOCK", block)
    if on_device:
        cut = lambda data, index: np.asarray(export._cut(data, index))  # noqa: E731
        monkeypatch.setattr(export, "_cut_shard", cut)
    model = open_model(write_folder(name, tmp_path / "source"))
    mesh = meshes.make_mesh({"data": 1, "fsdp": 4, "tensor": 2, "context": 1})
    abstract = decoder.abstract(model.spec, jnp.float32)
    shardings = meshes.shardings(decoder.axes(model.spec), abstract, mesh)
    _export(model, tmp_path / "out", load_params(model, shardings, jnp.float32))
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "source")


def test_a_part_is_cut_from_the_same_array_more_than_once():
    """JAX hands out the set of an array's devices itself, not a copy."""
    on = meshes.make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1}, jax.devices()[:1])
    table = jax.device_put(np.arange(12.0).reshape(3, 4), meshes.replicated(on))
    for _ in range(2):
        cut = export._cut_shard(table, (slice(0, 2), slice(1, 3)))
        np.testing.assert_array_equal(cut, [[1, 2], [5, 6]])


def test_the_ids_agree_in_every_file(tmp_path, tokenizer_folder):
    source = write_folder("llama", tmp_path / "source", pad_token_id=2, custom={"kept": [1]})
    (source / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "eos_token_id": 9, "pad_token_id": 9})
    )
    out = tmp_path / "out"
    tokenizer = Tokenizer(tokenizer_folder)
    options = {"tokenizer": tokenizer, "template": Template(), "stop_ids": [5, 2, 5]}
    _export(open_model(source), out, **options)
    config = json.loads((out / "config.json").read_text())
    generation = json.loads((out / "generation_config.json").read_text())
    for found in (config, generation):
        assert found["eos_token_id"] == [2, 5]
        assert found["bos_token_id"] == 1
        assert found["pad_token_id"] == 0
    assert generation["temperature"] == 0.6
    assert config["custom"] == {"kept": [1]}
    assert config["architectures"] == ["LlamaForCausalLM"]

    _export(open_model(source), out, **{**options, "stop_ids": [2]})
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize(
    ("pad", "config_pad", "expected"),
    [(2, 7, 7), (7, 2, 7), (None, 2, 2), (2, None, 2), (None, None, None)],
)
def test_pad_is_kept_out_of_eos_where_another_is_known(pad, config_pad, expected):
    tokenizer = Tokenizer(Path(), pad_id=pad)
    assert (
        export._special_ids({"pad_token_id": config_pad}, tokenizer, [5])["pad_token_id"]
        == expected
    )


def test_a_tokenizer_without_bos_or_eos_leaves_the_models_ids():
    tokenizer = Tokenizer(Path(), bos_id=None, eos_id=None, pad_id=None)
    config = {"bos_token_id": 4, "eos_token_id": [6, 7]}
    assert export._special_ids(config, tokenizer, []) == config


def test_the_tokenizer_travels_byte_for_byte_with_the_template_trained(tmp_path, tokenizer_folder):
    model = open_model(write_folder("llama", tmp_path / "source"))
    out = tmp_path / "out"
    _export(model, out, tokenizer=Tokenizer(tokenizer_folder), template=Template())
    file = "tokenizer.json"
    assert (out / file).read_bytes() == (tokenizer_folder / file).read_bytes()
    before = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    after = json.loads((out / "tokenizer_config.json").read_text())
    assert after == {key: value for key, value in before.items() if key != "chat_template"}
    assert (out / "chat_template.jinja").read_text() == JINJA
    assert (out / "README.md").read_text() == CARD

    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": "a prime"}]
    text = loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>a prime<|end|><|assistant|>"
    ids = loaded.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert loaded.decode(ids) == text
    assert (loaded.bos_token_id, loaded.eos_token_id) == (1, 2)


def test_a_bare_tokenizer_gets_a_config(tmp_path, tokenizer_folder):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tokenizer_folder / "tokenizer.json", bare)
    model = open_model(write_folder("llama", tmp_path / "source"))
    _export(model, tmp_path / "out", tokenizer=Tokenizer(bare), template=Template({}))
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (loaded.bos_token, loaded.eos_token) == ("<s>", "</s>")
    assert loaded.decode(loaded("a prime")["input_ids"]) == "a prime"


@pytest.mark.parametrize("template", ["alpaca", "llama2"])
def test_a_real_tokenizer_and_our_templates(template, tmp_path, shared_data):
    """Mistral's tokenizer with templates of `data/`: AutoTokenizer alone gives our prompt ids."""
    transformers = pytest.importorskip("transformers")
    source = shared_data / "tokenizers" / "mistral-v3"
    tokenizer = load_tokenizer(str(source))
    resolved = resolve(template, tokenizer)
    model = open_model(write_folder("mistral-window", tmp_path / "source"))
    stop_ids = [resolved.stop_id]
    out = tmp_path / "out"
    _export(model, out, tokenizer=tokenizer, template=resolved, stop_ids=stop_ids)
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": "Name a prime."}]
    ids = loaded.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    prompt = render_prompt(resolved, [Message("user", "Name a prime.")])
    assert ids == tokenizer.encode("".join(span.text for span in prompt))
    for file in ("tokenizer.json", "tokenizer.model"):
        assert (out / file).read_bytes() == (source / file).read_bytes()
    assert loaded.eos_token_id == tokenizer.eos_id
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_id == resolved.stop_id


def test_without_a_tokenizer_the_sources_files_are_kept(tmp_path, tokenizer_folder):
    source = write_folder("llama", tmp_path / "source")
    shutil.copytree(tokenizer_folder, source, dirs_exist_ok=True)
    (source / "chat_template.jinja").write_text("{{ 'its own' }}")
    _export(open_model(source), tmp_path / "out")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 2


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_the_export_and_gives_the_logits(name, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    _export(open_model(write_folder(name, tmp_path / "source")), tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float32
    for text, expected in zip(TEXTS, stored(name).logits, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor(text)[None]).logits[0].numpy()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


# -- atomic, or not at all


def _crash(*args, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["_write_configs", "write_tokenizer", "_verify", "flush"])
def test_a_failed_export_leaves_the_earlier_one(step, tmp_path, monkeypatch):
    model = open_model(write_folder("llama", tmp_path / "source"))
    out = tmp_path / "runs" / "hf"
    with monkeypatch.context() as patch:
        patch.setattr(export, step, _crash)
        with pytest.raises(ConfigError, match=r"runs/hf: cannot write the model .*No space left"):
            _export(model, out)
    assert list(out.parent.iterdir()) == []

    _export(model, out, card="first")
    with monkeypatch.context() as patch:
        patch.setattr(export, step, _crash)
        with pytest.raises(ConfigError, match="an earlier export there is untouched"):
            _export(model, out, card="second")
    assert [path.name for path in out.parent.iterdir()] == ["hf"]
    assert (out / "README.md").read_text() == "first"
    _export(model, out, card="second")
    assert (out / "README.md").read_text() == "second"


def test_what_a_killed_export_left_is_cleared(tmp_path):
    model = open_model(write_folder("llama", tmp_path / "source"))
    out = tmp_path / "out"
    _export(model, out, card="first")
    out.rename(tmp_path / ".out.old")  # killed between the two renames
    (tmp_path / ".out.new-123").mkdir()
    (tmp_path / ".out.new-123" / "config.json").write_text("{}")
    params = load_params(model, None, jnp.float32)
    params["head"]["kernel"] = params["head"]["kernel"].at[0, 0].set(1e6)
    with pytest.raises(ConfigError, match="cannot hold"):
        _export(model, out, params, weights=WeightFormat("float16"))
    assert (out / "README.md").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


KILLED = """
import os, signal, sys
from pathlib import Path
from jaxtune.hf import export, tensors
from jaxtune.hf.load import load_params, open_model

def killed(*args):
    os.kill(os.getpid(), signal.SIGKILL)

model = open_model(sys.argv[1])
module, name = sys.argv[3].split(".")
setattr({"export": export, "tensors": tensors}[module], name, killed)
export.export_model(
    Path(sys.argv[2]), model=model, params=load_params(model, None, "float32"), tokenizer=None,
    template=None, card="second",
)
"""


@pytest.mark.parametrize("when", ["tensors.checksum", "export.damaged", "export.write_tokenizer"])
def test_a_process_killed_leaves_the_earlier_export(when, tmp_path):
    """SIGKILL while it writes values, reads them back, or writes the small files."""
    source, out = write_folder("llama", tmp_path / "source"), tmp_path / "out"
    _export(open_model(source), out, card="first")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(out), when],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = tmp_path.glob(".out.new-*")
    assert not (left / "README.md").exists() or "second" in (left / "README.md").read_text()
    assert (out / "README.md").read_text() == "first"
    assert _bytes(out) == _bytes(source)
    _export(open_model(source), out, card="third")
    assert (out / "README.md").read_text() == "third"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_disk_too_small_is_said_before_writing(tmp_path, monkeypatch):
    model = open_model(write_folder("llama", tmp_path / "source"))
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"needs 0.1 MB; the disk has 0.0 MB left. Free some"):
        _export(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_place_that_cannot_be_written(tmp_path):
    model = open_model(write_folder("llama", tmp_path / "source"))
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"file/out: cannot write the model .*(File exists|Not a directory)"
    ):
        _export(model, tmp_path / "file" / "out")
    with pytest.raises(ConfigError, match="file: is a file; an export is a folder"):
        _export(model, tmp_path / "file")


def test_only_an_export_is_replaced(tmp_path):
    model = open_model(write_folder("llama", tmp_path / "source"))
    with pytest.raises(ConfigError, match="is the model being read; an export there would destroy"):
        check_target(tmp_path / "source", model)
    (tmp_path / "home").mkdir()
    check_target(tmp_path / "home", model)
    (tmp_path / "home" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"no exported model \(thesis\.tex, which is no part"):
        check_target(tmp_path / "home", model)
    (tmp_path / "home" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"\(thesis\.tex, which is no part of one\)"):
        check_target(tmp_path / "home", model)
    (tmp_path / "home" / "thesis.tex").rename(tmp_path / "thesis.tex")
    check_target(tmp_path / "home", model)
    (tmp_path / "home" / "model.safetensors").mkdir()
    with pytest.raises(ConfigError, match=r"model\.safetensors, which is no part"):
        check_target(tmp_path / "home", model)


def test_a_disk_that_lies_is_found_out(tmp_path, monkeypatch):
    model = open_model(write_folder("llama", tmp_path / "source"))

    def flip(handle, values, start):
        if bytes(values[:4]) == marked.tobytes()[:4]:
            values = bytes([values[0] ^ 1]) + bytes(values[1:])
        write(handle, values, start)

    marked = tensors("llama")["model.norm.weight"]
    write = safetensors_io._write_at
    monkeypatch.setattr(safetensors_io, "_write_at", flip)
    with pytest.raises(
        ConfigError, match=r"model.norm.weight reads back other than it was written"
    ):
        _export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_params_of_another_model_are_refused(tmp_path):
    model = open_model(write_folder("llama", tmp_path / "source"))
    params = load_params(model, None, jnp.float32)
    del params["head"]
    with pytest.raises(ValueError, match=r"not the model's parameters: .*head/kernel"):
        _export(model, tmp_path / "out", params)
