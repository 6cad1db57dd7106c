"""The main job as a user runs it: trains, exports, survives kills and signals, refuses mistakes."""

from __future__ import annotations

import html
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jaxtune import train
from jaxtune.config import Diverged, load
from jaxtune.hf.load import load_params, open_model
from jaxtune.tree import named

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "configs" / "quickstart" / "model"
PLACES = ("Paris", "Rome", "Oslo", "Cairo", "Lima", "Quito", "Delhi", "Seoul")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl, eval.jsonl and model/ (config and tokenizer, no weights)."""
    folder = tmp_path_factory.mktemp("material")
    rows = [
        {
            "instruction": f"Where is number {i}?",
            "output": f"In {PLACES[i % 8]}" + " today" * (i % 5),
        }
        for i in range(44)
    ]
    write(folder / "train.jsonl", rows[:40])
    write(folder / "eval.jsonl", rows[40:44])
    shutil.copytree(TOKENIZER, folder / "model")
    vocab = len(json.loads((TOKENIZER / "tokenizer.json").read_text())["model"]["vocab"]) + 16
    config = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "hidden_act": "silu", "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    (folder / "model" / "config.json").write_text(json.dumps(config))
    return folder


def write(path: Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def flags(material: Path, out: Path, **more: object) -> list[str]:
    """40 examples, 8 a step: 5 steps an epoch, 12 steps."""
    values: dict[str, object] = {
        "model_name_or_path": material / "model", "init": "random",
        "dataset": material / "train.jsonl", "output_dir": out, "max_length": 64,
        "mesh.fsdp": 1, "mesh.data": -1, "global_batch_size": 8, "per_device_train_batch_size": 1,
        "max_steps": 12, "learning_rate": 1e-2, "save_steps": 5, "logging_steps": 1,
        "lr_scheduler_type": "cosine", "gradient_checkpointing": "none",
        "packing": "false", **more,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def rows_of(out: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("tokens_per_second", "mfu")} for r in rows]


def assert_same_model(a: Path, b: Path) -> None:
    ours, theirs = (named(load_params(open_model(out / "hf"), None, jnp.float32)) for out in (a, b))
    for name, value in ours.items():
        assert np.asarray(value).tobytes() == np.asarray(theirs[name]).tobytes(), name


def in_process(argv: Sequence[str], *, before: str = "") -> subprocess.CompletedProcess[str]:
    """The door in a process of its own, on two devices, after some Python lines."""
    code = f"import sys\n{before}\nfrom jaxtune import train\nsys.exit(train.main(sys.argv[1:]))"
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    env["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".jax_cache")
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return subprocess.run(
        [sys.executable, "-c", code, *argv],
        capture_output=True, text=True, timeout=240, env=env, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 12 steps on two devices, evaluated at every epoch's end."""
    out = tmp_path_factory.mktemp("straight") / "out"
    done = in_process(flags(material, out, eval_datasets=material / "eval.jsonl"))
    assert done.returncode == 0, done.stderr
    assert "step 12/12" in done.stderr
    assert "read back and equal to the parameters" in done.stderr
    assert done.stdout == ""
    return out


def test_a_run_leaves_what_the_contract_says(straight: Path) -> None:
    rows = rows_of(straight)
    trains = [r for r in rows if r["kind"] == "train"]
    evals = [r for r in rows if r["kind"] == "eval"]
    assert [r["step"] for r in trains] == list(range(1, 13))
    assert trains[-1]["loss"] < trains[0]["loss"]
    assert set(trains[0]) == {
        "kind", "step", "epoch", "loss", "token_accuracy", "grad_norm", "learning_rate",
        "tokens_total", "tokens_trained", "examples_seen",
    }  # fmt: skip
    per_epoch = [r["examples_seen"] for r in trains if r["epoch"] in (1.0, 2.0)]
    assert per_epoch == [40, 80]  # every example once an epoch
    assert evals[-1]["step"] == 12
    assert set(evals[0]) == {"kind", "step", "eval_loss", "eval_perplexity", "eval_token_accuracy",
                             "eval_tokens_trained", "by_dataset"}  # fmt: skip
    assert list(evals[0]["by_dataset"]) == ["eval"]
    assert yaml.safe_load((straight / "config.yaml").read_text())["max_steps"] == 12
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                 "chat_template.jinja", "README.md"):  # fmt: skip
        assert (straight / "hf" / name).is_file(), name
    (start,) = [json.loads(line) for line in (straight / "starts.jsonl").read_text().splitlines()]
    assert (start["step"], start["total_steps"], start["devices"]) == (0, 12, 2)
    page = html.unescape((straight / "report.html").read_text())
    losses = json.dumps([row["loss"] for row in trains], separators=(",", ":"))
    for text in (f'"name":"training","x":[1,2,3,4,5,6,7,8,9,10,11,12],"y":{losses}', "of 12",
                 "Tokens of an example", "<span class=\"t y\"", "nearly trained"):  # fmt: skip
        assert text in page


def test_the_same_command_again_finds_the_run_done(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "hf")
    before = (straight / "metrics.jsonl").read_text()
    again = in_process(
        ["--config", str(straight / "config.yaml"), "--output_dir", str(tmp_path / "out")]
    )
    assert again.returncode == 0, again.stderr
    assert "going on after step 12" in again.stderr
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == before
    assert_same_model(straight, tmp_path / "out")


# After the step's update and before anything is saved of it; 5 and 10 are where epochs end and
# checkpoints are being written.
KILL = """
import os, signal
from jaxtune import loop
read = loop.Loop._read
def dying(self):
    if self._pending and self._pending[0] + 1 == {step}:
        if {settled}: self.checkpoints.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    read(self)
loop.Loop._read = dying
"""


@pytest.mark.parametrize(
    ("step", "settled", "resumes_after"),
    [
        (2, True, None),
        (5, True, None),
        (6, False, None),  # perhaps while step 5 is being written: None = wherever it can
        (6, True, 5),  # exactly at an epoch's end
        (9, True, 5),
        (11, True, 10),
    ],
)
def test_killed_and_resumed_is_the_uninterrupted_run(
    material: Path,
    straight: Path,
    tmp_path: Path,
    step: int,
    settled: bool,
    resumes_after: int | None,
) -> None:
    argv = flags(material, tmp_path / "out", eval_datasets=material / "eval.jsonl")
    killed = in_process(argv, before=KILL.format(step=step, settled=settled))
    assert killed.returncode == -signal.SIGKILL
    resumed = in_process(argv)
    assert resumed.returncode == 0, resumed.stderr
    if resumes_after:
        assert f"going on after step {resumes_after}" in resumed.stderr
    assert rows_of(tmp_path / "out") == rows_of(straight)
    assert_same_model(straight, tmp_path / "out")


def test_a_signal_saves_and_exits_75(material: Path, straight: Path, tmp_path: Path) -> None:
    argv = flags(material, tmp_path / "out", eval_datasets=material / "eval.jsonl")
    before = KILL.replace("SIGKILL", "SIGTERM").format(step=7, settled=False)
    stopped = in_process(argv, before=before)
    assert stopped.returncode == 75, stopped.stderr
    assert "stopped by SIGTERM after step 8, which is saved" in stopped.stderr
    resumed = in_process(argv)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on after step 8" in resumed.stderr
    assert rows_of(tmp_path / "out") == rows_of(straight)
    assert_same_model(straight, tmp_path / "out")


def test_other_data_is_refused_on_resume(material: Path, straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "out")
    rows = [json.loads(line) for line in (material / "train.jsonl").read_text().splitlines()]
    rows[3]["output"] += "!"
    write(tmp_path / "changed.jsonl", rows)
    done = in_process(flags(material, tmp_path / "out", dataset=tmp_path / "changed.jsonl"))
    assert done.returncode == 2
    assert "step 12 was trained on other data" in done.stderr
    assert "Traceback" not in done.stderr
    for changed in (
        {"seed": 1},
        {"global_batch_size": 4},
        {"template": "plain {instruction} {output}"},
    ):
        done = in_process(flags(material, tmp_path / "out", **changed))
        assert (done.returncode, "other data" in done.stderr) == (2, True), changed


def run(material: Path, out: Path, **more: object) -> train.Result:
    names = flags(material, out, **more)
    overrides = dict(zip((n[2:] for n in names[::2]), names[1::2], strict=True))
    return train.run(load(overrides=overrides))


def test_run_from_python_gives_its_result(material: Path, tmp_path: Path) -> None:
    result = run(material, tmp_path / "out", max_steps=2, eval_split=0.2, export=False)
    assert (result.step, result.model_dir, result.output_dir) == (2, None, tmp_path / "out")
    assert result.metrics["train"]["step"] == 2
    assert result.metrics["eval"]["eval_tokens_trained"] > 0


def test_divergence_keeps_the_last_good_checkpoint(material: Path, tmp_path: Path) -> None:
    with pytest.raises(Diverged) as error:
        run(material, tmp_path / "out", learning_rate=1e30, lr_scheduler_type="constant",
            max_grad_norm=0, save_steps=1)  # fmt: skip
    assert "the loss is nan" in str(error.value)
    assert not (tmp_path / "out" / "hf").exists()
    saved = sorted(int(p.name) for p in (tmp_path / "out" / "checkpoints").iterdir())
    assert saved
    code = train.main(flags(material, tmp_path / "out", learning_rate=1e30, max_grad_norm=0,
                            lr_scheduler_type="constant", save_steps=1))  # fmt: skip
    assert code == 3


def test_resume_says_what_it_cannot_do(material: Path, straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "out")
    for more, message in (
        ({"resume": "never"}, "would be overwritten"),
        ({"max_steps": 3}, "holds step 12, but this run ends at 3"),
    ):
        done = in_process(flags(material, tmp_path / "out", **more))
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    empty = in_process(flags(material, tmp_path / "empty", resume="must"))
    assert (empty.returncode, "holds no checkpoint" in empty.stderr) == (2, True)


def broken(tmp_path: Path, name: str) -> Path:
    good = [{"instruction": "a", "output": "b"}] * 30
    path = tmp_path / f"{name}.jsonl"
    if name == "empty":
        path.write_text("")
    elif name == "json":
        lines = [json.dumps(row) for row in good]
        lines[16] = '{"instruction": "a", "output": '
        path.write_text("\n".join(lines))
    elif name == "field":
        write(path, [{"instruction": "a", "response": "b"}] * 3)
    return path


def without_weights(material: Path, tmp_path: Path, **changes: object) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(material / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("missing file", "none.jsonl"),
        ("empty", "empty"),
        ("json", "json.jsonl:17"),
        ("field", "no known format has these columns: instruction, response"),
        ("unknown key", "Did you mean 'learning_rate'?"),
        ("bad value", "learning_rate"),
        ("placeholder", "{instructoin}"),
        ("no weights", "no weights"),
        ("model type", "model_type"),
        ("mesh", "8 devices cannot be"),
        ("output", "cannot be written"),
        ("no model", "model_name_or_path is not set"),
        ("vocabulary", "embedding rows"),
        ("batch", "do not divide into microbatches"),
    ],
)
def test_mistakes_are_exit_2_with_one_message(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str, message: str
) -> None:
    (tmp_path / "file").write_text("")
    more: dict[str, object] = {
        "missing file": {"dataset": tmp_path / "none.jsonl"},
        "unknown key": {"learning_rat": 1},
        "bad value": {"learning_rate": "fast"},
        "placeholder": {"template": "{instructoin}: {output}"},
        "no weights": {"init": "pretrained"},
        "mesh": {"mesh.data": 3},
        "output": {"output_dir": tmp_path / "file" / "out"},
        "batch": {"global_batch_size": 12},
    }.get(mistake, {})  # fmt: skip
    if mistake in ("empty", "json", "field"):
        more = {"dataset": broken(tmp_path, mistake)}
    elif mistake == "model type":
        more = {"model_name_or_path": without_weights(material, tmp_path, model_type="lama")}
    elif mistake == "vocabulary":
        more = {"model_name_or_path": without_weights(material, tmp_path, vocab_size=20)}
    argv = flags(material, tmp_path / "out", **more)
    if mistake == "no model":
        argv = argv[4:]
    assert train.main(argv) == 2
    shown = capsys.readouterr()
    last = shown.err.strip().splitlines()[-1]
    assert message in last
    assert last.startswith("jaxtune train: ")
    assert "Traceback" not in shown.err
    assert not (tmp_path / "out" / "hf").exists()
