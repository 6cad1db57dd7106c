"""The main job as a user runs it: trains, exports, survives kills and signals, refuses mistakes."""

from __future__ import annotations

import html
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from children import environment
from tiny import write_model

from jaxtune import chat, evaluate, train
from jaxtune.config import ConfigError, Diverged, load
from jaxtune.hf.load import load_params, open_model
from jaxtune.inference import sample_prompts
from jaxtune.storage import lock
from jaxtune.training import loop
from jaxtune.training.checkpoint.checkpoints import Checkpoints, read_meta
from jaxtune.tree import named

ROOT = Path(__file__).resolve().parents[2]
# What depends on the clock and the machine.
CLOCK = ("tokens_per_second", "mfu", "step_seconds", "data_wait", "memory_peak_bytes")
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
    unusable = {"instruction": "Where?", "output": ""}
    write(folder / "train.jsonl", [*rows[:40], unusable])
    write(folder / "eval.jsonl", [*rows[40:44], unusable])
    write_model(folder / "model")
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
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in rows]


def assert_same_model(a: Path, b: Path) -> None:
    ours, theirs = (named(load_params(open_model(out / "hf"), None, jnp.float32)) for out in (a, b))
    for name, value in ours.items():
        assert np.asarray(value).tobytes() == np.asarray(theirs[name]).tobytes(), name


def in_process(
    argv: Sequence[str], *, before: str = "", devices: int = 2
) -> subprocess.CompletedProcess[str]:
    """The door in a process of its own, on some devices, after some Python lines."""
    code = f"import sys\n{before}\nfrom jaxtune import train\nsys.exit(train.main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *argv],
        capture_output=True, text=True, timeout=240, env=environment(devices), check=False,
    )  # fmt: skip


# Writes down which examples each batch to train on holds.
LISTED = """
from jaxtune.data.dataset import Batches
make = Batches.batch_rows
def listed(self, step, low, high):
    if self._order == "shuffled":
        with open({path!r}, "a") as file:
            file.write(f"{{step}} {{self.examples(step)}}\\n")
    return make(self, step, low, high)
Batches.batch_rows = listed
"""


def listed(path: Path) -> dict[str, str]:
    """Step -> its examples; a step that was made twice held the same."""
    found: dict[str, str] = {}
    for line in path.read_text().splitlines():
        step, examples = line.split(" ", 1)
        assert found.setdefault(step, examples) == examples
    return found


@pytest.fixture(scope="module")
def straight(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 12 steps on two devices, evaluated at every epoch's end."""
    out = tmp_path_factory.mktemp("straight") / "out"
    argv = flags(material, out, eval_datasets=material / "eval.jsonl")
    done = in_process(argv, before=LISTED.format(path=str(out.parent / "ids")))
    assert done.returncode == 0, done.stderr
    assert "step 12/12" in done.stderr
    assert "read back and equal to the parameters" in done.stderr
    assert done.stdout == ""
    for line in LOST:
        assert line in done.stderr
    return out


LOST = (
    "dataset train: 2.4% of 41 rows dropped: 1 empty answer",
    "evaluation dataset eval: 20.0% of 5 rows dropped: 1 empty answer",
)


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
    for line in LOST:
        assert f"- {line}" in (straight / "hf" / "README.md").read_text()
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
from jaxtune.training import loop
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
        (6, False, None),  # perhaps while step 5 is being written: None = wherever it can
        (6, True, 5),  # exactly at an epoch's end
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


def strike(monkeypatch: pytest.MonkeyPatch, where: str, number: int) -> None:
    """SIGTERM to this process: before evaluation `number` of a run, in its first or second batch,
    or while the sample prompts are answered. No batch follows the one that it came in."""
    seen = {"evaluations": 0}

    def now() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def evaluated(*args: Any, **kwargs: Any) -> Any:
        seen["evaluations"] += 1
        return evaluate_all(*args[:3], struck(args[3]), **kwargs)

    def struck(batches: Any) -> Any:
        strikes = {"first batch": 0, "second batch": 1}.get(where)
        for at, batch in enumerate(batches):
            if seen["evaluations"] == number and strikes is not None:
                assert at <= strikes
                if at == strikes:
                    now()
            yield batch

    def stepped(self: Any) -> None:
        read(self)
        if where == "before" and seen["evaluations"] == number - 1:
            now()

    def answered(*args: Any, **kwargs: Any) -> Any:
        if where == "answers" and seen["evaluations"] == number:
            now()
        return answer(*args, **kwargs)

    evaluate_all, read, answer = loop.evaluate, loop.Loop._read, sample_prompts.generate
    monkeypatch.setattr(loop, "evaluate", evaluated)
    monkeypatch.setattr(loop.Loop, "_read", stepped)
    monkeypatch.setattr(sample_prompts, "generate", answered)


def test_a_run_stopped_in_its_evaluations_is_the_undisturbed_run(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    more = {
        "eval_split": 0.5, "eval_steps": 1, "learning_rate": 0.5, "save_steps": 100,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "max_grad_norm": 0,
        "early_stopping_patience": 3, "load_best_model_at_end": True, "max_steps": 40,
        "per_device_eval_batch_size": 1, "sample_prompts": '["Where is number 3?"]',
    }  # fmt: skip
    assert train.main(flags(material, whole, **more)) == 0
    for where, number, stops in (
        ("before", 2, 2), ("first batch", 1, 2), ("second batch", 2, 3), ("answers", 2, 4),
    ):  # fmt: skip
        with monkeypatch.context() as patched:
            strike(patched, where, number)
            assert train.main(flags(material, out, **more)) == 75
        saved = {int(path.name) for path in (out / "checkpoints").iterdir()}
        assert max(saved) == stops, where
    assert train.main(flags(material, out, **more)) == 0
    assert rows_of(out) == rows_of(whole)
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert_same_model(whole, out)


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


def run(material: Path, out: Path, **more: object) -> train.TrainResult:
    names = flags(material, out, **more)
    overrides = dict(zip((n[2:] for n in names[::2]), names[1::2], strict=True))
    listed = {name: value for name, value in more.items() if isinstance(value, list)}
    return train.run(load(overrides={**overrides, **listed}))


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


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_while_a_run_goes_on_another_is_refused_and_a_step_is_replayed(
    material: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    monkeypatch.setattr(lock, "_ENDING_SECONDS", 0.1)
    (out / "checkpoints" / "13").mkdir()  # what the run is writing
    (out / "checkpoints" / "14.orbax-checkpoint-tmp").mkdir()
    spoilt = out / "checkpoints" / "10" / "meta" / "metadata"
    spoilt.write_bytes(spoilt.read_bytes()[:-1])
    with lock.held(out, print):
        before = tree(out)
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on .* is writing there"):
            run(material, out)
        assert tree(out) == before
        argv = ["--config", str(out / "config.yaml"), "--output_dir", str(out), "--replay_step"]
        assert train.main([*argv, "11"]) == 0
        after = tree(out)
        assert after.pop("step-11.json")
        assert after == before
        with pytest.raises(ConfigError, match="replay_step 13: this run has 12 steps"):
            train.run(load(out / "config.yaml"), train.TrainOptions(replay_step=13))


def test_the_config_is_there_whole_or_as_it_was(
    material: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    before = (out / "config.yaml").read_bytes()
    was = os.fsync

    def full(file: int) -> None:
        if Path(f"/proc/self/fd/{file}").resolve().name.startswith("config.yaml"):
            raise OSError(28, "No space left on device")
        was(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"out/config\.yaml: cannot be written: No space left"):
        run(material, out, logging_steps=2)
    assert (out / "config.yaml").read_bytes() == before


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


# -- what a run says of steps that go wrong -------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 5 of the fourth step's batch has weights that are not numbers."""
    from jaxtune.data.dataset import Batches

    make = Batches.batch_rows

    def batch_rows(self: Batches, step: int, low: int, high: int) -> Any:
        batch = make(self, step, low, high)
        if step == 3 and low <= 5 < high and self._order == "shuffled":
            batch.weights[5 - low] = np.nan
        return batch

    monkeypatch.setattr(Batches, "batch_rows", batch_rows)


@pytest.mark.usefixtures("poisoned")
def test_a_step_that_is_not_finite_is_written_down_skipped_and_replayed(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    more = {"max_steps": 6, "save_steps": 2, "export": False}
    with pytest.raises(Diverged) as error:
        run(material, out, **more)
    assert f"in {out / 'step-4.json'}" in str(error.value)
    assert "step 2." in str(error.value)  # the newest checkpoint
    found = json.loads((out / "step-4.json").read_text())
    assert found["loss"] == "nan"
    assert set(found["grad_norms"].values()) == {"nan"}
    assert "params/embed/table" in found["grad_norms"]
    assert found["checkpoint"] == 2
    assert len(found["rows"]) == 8
    (example,) = found["rows"][5]
    assert example["path"] == str(material / "train.jsonl")

    # The same command, allowed to skip one, goes on from step 2 and keeps count over a resume.
    result = run(material, out, **more, max_skipped_steps=1)
    assert result.step == 6
    steps = [row["step"] for row in rows_of(out)]
    assert steps == [1, 2, 3, 5, 6]
    assert "Skipped, 1 of max_skipped_steps 1" in capsys.readouterr().err

    # The command it gives: the row is named.
    command = shlex.split(found["replay"])
    assert command[:3] == ["python", "-m", "jaxtune.train"]
    before = (out / "metrics.jsonl").read_bytes()
    assert train.main(command[3:]) == 0
    again = json.loads((out / "step-4.json").read_text())
    assert {k: again[k] for k in ("loss", "rows", "grad_norms")} == {
        k: found[k] for k in ("loss", "rows", "grad_norms")
    }
    assert [row for row, loss in enumerate(again["row_losses"]) if loss == "nan"] == [5]
    shown = capsys.readouterr().out
    assert f"row 5: {material / 'train.jsonl'} record {example['record']}" in shown

    # A sound step too, and it is the step that was.
    assert train.main([*command[3:-1], "3"]) == 0
    sound = json.loads((out / "step-3.json").read_text())
    was = next(row for row in rows_of(out) if row["step"] == 3)
    assert sound["loss"] == pytest.approx(was["loss"], abs=1e-6)
    assert sound["grad_norm"] == pytest.approx(was["grad_norm"], rel=1e-5)
    whole = math.sqrt(sum(norm**2 for norm in sound["grad_norms"].values()))
    assert whole == pytest.approx(sound["grad_norm"], rel=1e-5)
    assert (out / "metrics.jsonl").read_bytes() == before


def test_early_stopping_exports_the_best_step_and_ends_for_good(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate at which eval_loss falls and then rises."""
    out = tmp_path / "out"
    more = {
        "eval_split": 0.2, "eval_steps": 1, "learning_rate": 0.5, "save_steps": 100,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "max_grad_norm": 0,
        "early_stopping_patience": 2, "load_best_model_at_end": True, "max_steps": 40,
        "profile_steps": [1, 2], "save_total_limit": 1, "save_dtype": "float32",
    }  # fmt: skip
    result = run(material, out, **more)
    losses = {r["step"]: r["eval_loss"] for r in rows_of(out) if r["kind"] == "eval"}
    best = min(losses, key=lambda step: losses[step])
    assert result.step == best + 2 == max(losses) < 40
    said = capsys.readouterr().err
    assert f"of step {best}; training ends at step {best + 2} of 40" in said
    assert f"best: step {best}, eval_loss" in said
    kept = {path.name for path in (out / "checkpoints").iterdir()}
    assert kept == {str(best), str(best + 2)}
    asked = {
        "model_name_or_path": str(out / "hf"), "dataset": str(material / "train.jsonl"),
        "eval_split": 0.2, "max_length": 64, "packing": False,
    }  # fmt: skip
    evaluated = evaluate.run(load(overrides=asked))
    assert evaluated.scores["eval_loss"] == pytest.approx(losses[best], abs=1e-4)
    assert list((out / "profile").rglob("*.xplane.pb"))
    card = (out / "hf" / "README.md").read_text()
    shown = f"| eval_loss | {losses[best]:.6g} |"
    assert shown in card
    assert result.metrics["eval"]["step"] == best + 2
    # Run again, it has nothing to do but the export.
    again = run(material, out, **more)
    assert again.step == best + 2
    assert again.metrics == result.metrics
    assert (out / "hf" / "README.md").read_text() == card


def test_a_save_is_no_time_of_training(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Checkpoints.save

    def slowly(self: Checkpoints, *args: Any, **kwargs: Any) -> None:
        time.sleep(3)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Checkpoints, "save", slowly)
    run(material, tmp_path / "out", max_steps=6, save_steps=3, export=False)
    text = (tmp_path / "out" / "metrics.jsonl").read_text()
    seconds = [json.loads(line)["step_seconds"] for line in text.splitlines()]
    assert seconds[3] is None
    assert max(found for found in seconds if found is not None) < 3


def test_a_device_without_memory_is_a_message(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def step(self: loop.Loop, *_: Any) -> Any:
        return jnp.zeros(2**45).block_until_ready()

    monkeypatch.setattr(loop.Loop, "_next", step)
    assert train.main(flags(material, tmp_path / "out")) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    for word in (
        "train: ", "allocating 140737488355328 bytes", "per_device_train_batch_size (now 1)",
        "gradient_checkpointing full (now none)", "mesh.fsdp (now 1;", "jaxtune plan",
    ):  # fmt: skip
        assert word in said


def test_an_interrupt_before_the_loop_is_one_line(material: Path, tmp_path: Path) -> None:
    before = (
        "from jaxtune.training import build as program\ndef build(*_): raise KeyboardInterrupt\n"
    )
    before += "program.build = build\n"
    done = in_process(flags(material, tmp_path / "out"), before=before)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "jaxtune train: interrupted."
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_best_step_that_is_gone_or_of_other_data_is_forgotten(
    material: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    losses = {2: 1.0, 4: 3.0, 6: 2.5, 8: 2.0, 10: 9.0, 12: 8.0}
    after = loop.EvalHistory.after
    monkeypatch.setattr(
        loop.EvalHistory, "after", lambda self, loss, step: after(self, losses[step], step)
    )
    out = tmp_path / "out"
    more = {"eval_steps": 2, "save_steps": 2, "save_total_limit": 1, "init": "random",
            "eval_datasets": material / "eval.jsonl", "export": False}  # fmt: skip
    run(material, out, **more, max_steps=4)
    capsys.readouterr()

    run(material, out, **more, max_steps=8, load_best_model_at_end=True)
    said = capsys.readouterr().err
    assert "the best step 2, eval_loss 1.0000, is kept nowhere any more" in said
    assert read_meta(out)["standing"] == {
        "best_step": 8, "best_loss": 2.0, "since_best": 0, "skipped": 0, "due": False
    }  # fmt: skip

    # Other data, on which nothing was measured before.
    rows = (material / "eval.jsonl").read_text().splitlines()
    (tmp_path / "other.jsonl").write_text(rows[0] + "\n")
    more["eval_datasets"] = tmp_path / "other.jsonl"
    run(material, out, **more, max_steps=12, load_best_model_at_end=True)
    said = capsys.readouterr().err
    assert "what is evaluated on is not what it was, so step 8 is no longer the best" in said
    assert read_meta(out)["standing"]["best_step"] == 12


@pytest.mark.slow
def test_elastic_from_eight_devices_to_four_to_one(
    material: Path, straight: Path, tmp_path: Path
) -> None:
    """fsdp over 8, killed; tensor=2 over 4, killed; 1 device: the same batches, the same losses."""
    out = tmp_path / "out"
    argv = flags(material, out, eval_datasets=material / "eval.jsonl")
    cut = {"mesh.fsdp": "-1", "mesh.data": "1"}
    seen: dict[str, str] = {}
    for devices, more, step in (
        (8, cut, 7),
        (4, {**cut, "mesh.tensor": "2"}, 11),
        (1, cut, None),
    ):
        words = list(argv)
        for name, value in more.items():
            if f"--{name}" in words:
                words[words.index(f"--{name}") + 1] = value
            else:
                words += [f"--{name}", value]
        ids = tmp_path / f"ids-{devices}"
        before = LISTED.format(path=str(ids)) + (
            KILL.format(step=step, settled=True) if step else ""
        )
        done = in_process(words, before=before, devices=devices)
        assert done.returncode == (-signal.SIGKILL if step else 0), done.stderr
        for number, examples in listed(ids).items():  # steps after the checkpoint come twice
            assert seen.setdefault(number, examples) == examples
    assert seen == listed(straight.parent / "ids")
    assert len(seen) == 12
    rows = rows_of(out)
    assert len(rows) == len(rows_of(straight))
    for row, expected in zip(rows, rows_of(straight), strict=True):
        assert (row["kind"], row["step"]) == (expected["kind"], expected["step"])
        name = "loss" if row["kind"] == "train" else "eval_loss"
        assert row[name] == pytest.approx(expected[name], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [0, 2])
def test_sample_prompts_are_answered_at_every_evaluation(
    lora: int, material: Path, straight: Path, tmp_path: Path
) -> None:
    """What a checkpoint answers, the exported model answers too; a resumed run drops later rows."""
    out = tmp_path / "out"
    prompts = ["Where is number 3?", "Where is number 4?"]
    more = {
        "sample_prompts": prompts, "eval_split": 0.2, "eval_steps": 2, "max_steps": 4,
        "save_steps": 2, "save_dtype": "float32",
    }  # fmt: skip
    if lora:
        more |= {"lora.r": lora, "init": "pretrained", "model_name_or_path": straight / "hf"}
    run(material, out, **more)
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (step, prompt) for step in (2, 4) for prompt in prompts
    ]
    assert {type(row["stopped"]) for row in rows} == {bool}
    name = str(out / "hf")
    said = chat.run(
        load(overrides={"model_name_or_path": name}),
        chat.ChatOptions(prompt=prompts[1], max_new_tokens=256),
    )
    assert said.answers[0]["response"] == rows[-1]["response"]
    shutil.rmtree(out / "checkpoints" / "4")
    before = (out / "samples.jsonl").read_text()
    run(material, out, **more)
    assert (out / "samples.jsonl").read_text() == before
