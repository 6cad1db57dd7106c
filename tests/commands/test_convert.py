"""The convert door: a run's checkpoint or a model folder becomes a folder others load."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.cases import tensors, write_folder, write_tokenizer

from jaxtune import convert
from jaxtune.config import ConfigError, dump, load
from jaxtune.data.tokenizer import load_tokenizer
from jaxtune.hf.load import load_params, open_model
from jaxtune.inference.load import resolved
from jaxtune.training.checkpoint.checkpoints import Checkpoints
from jaxtune.training.state import TrainState
from jaxtune.tree import named

JINJA = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run with checkpoints of steps 1 and 2: the base with every value scaled by 1 + step."""
    root = tmp_path_factory.mktemp("convert")
    base = write_tokenizer(write_folder("llama", root / "base"), chat_template=JINJA)
    run = root / "run"
    run.mkdir()
    config = load(overrides={"model_name_or_path": str(base), "dataset": "train.json"})
    (run / "config.yaml").write_text(dump(config))
    rows = [{"kind": "train", "step": step, "loss": 3.0 - step} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    params = load_params(open_model(base), None, jnp.float32)
    checkpoints = Checkpoints(run)
    for step in (1, 2):
        scaled = jax.tree.map(lambda p, by=1 + step: p * by, params)
        state = TrainState(jnp.int32(step), {"params": scaled}, {"count": jnp.int32(step)})
        checkpoints.save(state, {"fingerprint": "f"}, step=step)
    checkpoints.wait()
    checkpoints.close()
    return run


def _equal_to_base_times(out: Path, factor: int) -> None:
    found = open_model(out)
    for name, values in tensors("llama").items():
        tensor = found.tensors[name]
        values = (values * np.float32(factor)).astype(tensor.dtype)
        placed = np.memmap(tensor.file, tensor.dtype, "r", tensor.start, tensor.shape)
        np.testing.assert_array_equal(placed, values)


def test_the_newest_checkpoint(run_dir, tmp_path, capsys):
    out = tmp_path / "out"
    assert convert.main([str(run_dir), str(out)]) == 0
    assert "step 2, 21 tensors" in capsys.readouterr().err
    _equal_to_base_times(out, 3)
    config = json.loads((out / "config.json").read_text())
    assert config["eos_token_id"] == [2, 5]  # </s>, and <|end|> that ends a turn
    assert (out / "chat_template.jinja").read_text() == JINJA
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    card = (out / "README.md").read_text()
    assert "| loss | 1 |" in card
    assert '"step": 2' in card


def test_from_python_it_says_what_it_needs():
    with pytest.raises(ConfigError, match="nothing says what to convert"):
        convert.run(load())


def test_a_run_without_an_export_is_asked_by_its_newest_checkpoint(run_dir, capsys):
    asked = resolved(load(overrides={"model_name_or_path": str(run_dir)}))
    assert asked.model_name_or_path == f"{run_dir}/checkpoints/2"
    assert "has no exported model; using" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is a run without an exported model"):
        load_tokenizer(str(run_dir))


def test_a_checkpoint_asked_with_the_config_of_its_run_has_the_tokenizer_of_its_base(run_dir):
    """Every field of a config.yaml counts as given; a tokenizer that is not named is none."""
    step = str(run_dir / "checkpoints" / "1")
    asked = {"model_name_or_path": step}
    found = [
        resolved(load(run_dir / "config.yaml", overrides=asked)),
        resolved(load(overrides=asked)),
    ]
    for config in found:
        assert config.model_name_or_path == step
        assert config.tokenizer_name == str(run_dir.parent / "base")
    given = resolved(load(overrides={**asked, "tokenizer_name": "other"}))
    assert given.tokenizer_name == "other"


@pytest.mark.parametrize("way", ["flag", "path"])
def test_one_checkpoint_in_another_dtype(run_dir, tmp_path, way):
    out = tmp_path / "out"
    source = run_dir / "checkpoints" / "1" if way == "path" else run_dir
    step = [] if way == "path" else ["--step", "1"]
    assert convert.main([str(source), str(out), *step, "--save_dtype", "bfloat16"]) == 0
    assert {str(tensor.dtype) for tensor in open_model(out).tensors.values()} == {"bfloat16"}
    _equal_to_base_times(out, 2)
    assert "| loss | 2 |" in (out / "README.md").read_text()


def test_half_a_line_of_a_killed_run_is_left_out(run_dir, tmp_path):
    run = shutil.copytree(run_dir, tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 2, "lo')
    assert convert.main([str(run), str(tmp_path / "out")]) == 0
    assert "| loss | 1 |" in (tmp_path / "out" / "README.md").read_text()


def test_a_model_folder_is_saved_anew(run_dir, tmp_path):
    base, out = run_dir.parent / "base", tmp_path / "out"
    assert convert.main([str(base), str(out), "--save_dtype", "float16"]) == 0
    params = named(load_params(open_model(out), None, jnp.float32))
    for name, expected in named(load_params(open_model(base), None, jnp.float16)).items():
        np.testing.assert_array_equal(params[name], expected)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (base / file).read_bytes()


def test_shards_of_a_size(run_dir, tmp_path):
    out = tmp_path / "out"
    assert convert.main([str(run_dir), str(out), "--max_shard_size", "20KB"]) == 0
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 26_000 for file in files)
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    _equal_to_base_times(out, 3)


def test_a_mistake_is_told(run_dir, tmp_path, capsys):
    base, out = run_dir.parent / "base", str(tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    moved = tmp_path / "moved"
    moved.mkdir()
    for argv, message in [
        ([str(run_dir)], "OUT_DIR is missing"),
        ([str(run_dir), out, "--step", "7"], "no checkpoint of step 7; there are: 1, 2"),
        ([str(run_dir / "checkpoints" / "1"), out, "--step", "2"], "is step 1, but --step is 2"),
        ([str(base), out, "--step", "1"], "--step 1, but there are no checkpoints in it"),
        ([str(moved), out], "no config.json there"),
        (
            [str(run_dir / "checkpoints"), out],
            f"holds the checkpoints of a run. Give {run_dir}, or",
        ),
        ([f"{run_dir}/checkpoints/", out], f"{run_dir}/checkpoints/STEP (there are: 1, 2)"),
        ([str(run_dir), str(tmp_path / "full")], "holds files that are no exported model"),
        ([str(run_dir), str(base)], "is the model being read"),
        ([str(run_dir), out, "--model_name_or_path", "/gone"], "/gone: no such folder"),
    ]:
        assert convert.main(argv) == 2, argv
        assert message in capsys.readouterr().err
    assert not Path(out).exists()


def test_a_run_without_its_config_is_told(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    assert convert.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "config.yaml: cannot read the config" in capsys.readouterr().err
