"""jt.train as a user of Python calls it: rows in memory, callbacks, metrics of one's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import write_model

import jaxtune as jt

CLOCK = ("tokens_per_second", "mfu", "step_seconds", "data_wait", "memory_peak_bytes")
ROWS = [{"instruction": f"Where is number {i}?", "output": f"In Oslo {i % 4}"} for i in range(32)]
HELD_OUT = [{"instruction": "Where are you?", "output": "In Rome"}]
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and the config of a tiny model, without weights."""
    folder = tmp_path_factory.mktemp("api") / "model"
    write_model(folder, layers=1, positions=128)
    return folder


def config(model: Path, out: Path, **more: Any) -> jt.Config:
    return jt.load_config({
        "model_name_or_path": str(model), "init": "random", "output_dir": str(out),
        "max_length": 64, "global_batch_size": 8, "per_device_train_batch_size": 1,
        "max_steps": STEPS, "logging_steps": 1, "eval_steps": 2, "save_steps": 2,
        "learning_rate": 0.01, "template": "auto", "export": False, **more,
    })  # fmt: skip


def metrics(out: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{name: row[name] for name in row if name not in CLOCK} for row in rows]


class Recorder(jt.Callback):
    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def on_start(self, run: Any) -> None:
        self.calls.append(("start", run.start))

    def on_step(self, row: dict[str, Any]) -> None:
        self.calls.append(("step", row["step"]))
        row.clear()  # of a copy

    def on_evaluation(self, row: dict[str, Any]) -> None:
        self.calls.append(("evaluation", row["step"]))
        row["eval_loss"] = 0.0

    def on_save(self, step: int, folder: Path) -> None:
        assert (folder / "digests-0.json").is_file(), "the checkpoint is whole"
        self.calls.append(("save", step))

    def on_end(self, result: Any) -> None:
        self.calls.append(("end", result.step))


class StopsAt(jt.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, row: dict[str, Any]) -> bool:
        return row["step"] >= self.step and jt.STOP


class Raises(jt.Callback):
    def on_step(self, row: dict[str, Any]) -> None:
        if row["step"] == 2:
            raise ValueError("not what I wanted")


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The metrics of a run without callbacks."""
    out = tmp_path_factory.mktemp("plain")
    jt.train(config(model, out), data=ROWS, eval_data=HELD_OUT)
    return metrics(out)


def test_callbacks_see_everything_and_change_nothing(
    model: Path, tmp_path: Path, plain: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder()
    result = jt.train(config(model, tmp_path), data=ROWS, eval_data=HELD_OUT, callbacks=[recorder])
    assert metrics(tmp_path) == plain
    assert recorder.calls == [
        ("start", 0), ("step", 1), ("step", 2), ("evaluation", 2), ("save", 2),
        ("step", 3), ("step", 4), ("evaluation", 4), ("save", 4), ("end", 4),
    ]  # fmt: skip
    assert (result.step, result.metrics["eval"]["step"]) == (4, 4)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_a_stopped_run_exports_and_the_same_call_resumes(
    model: Path, tmp_path: Path, plain: list[dict[str, Any]]
) -> None:
    settings = config(model, tmp_path, export=True)
    stopped = jt.train(settings, data=ROWS, eval_data=HELD_OUT, callbacks=[StopsAt(1)])
    assert 1 <= stopped.step < STEPS
    assert stopped.model_dir is not None
    assert (stopped.model_dir / "model.safetensors").is_file()
    result = jt.train(settings, data=iter(ROWS), eval_data=HELD_OUT)
    assert result.step == STEPS
    assert metrics(tmp_path) == plain
    with pytest.raises(jt.ConfigError, match="was trained on other data"):
        jt.train(settings, data=ROWS[1:], eval_data=HELD_OUT)


def test_a_callback_that_raises_ends_the_run_after_a_save(
    model: Path, tmp_path: Path, plain: list[dict[str, Any]]
) -> None:
    settings = config(model, tmp_path, save_steps=100)
    with pytest.raises(jt.CallbackError, match=r"callback Raises\.on_step: ValueError") as error:
        jt.train(settings, data=ROWS, eval_data=HELD_OUT, callbacks=[Raises()])
    assert isinstance(error.value.__cause__, ValueError)
    assert error.value.__cause__.__traceback__ is not None
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert jt.train(settings, data=ROWS, eval_data=HELD_OUT).step == STEPS
    assert metrics(tmp_path) == plain


@pytest.mark.parametrize("callbacks", [Recorder(), [Recorder], [lambda row: None]])
def test_what_is_no_callback(model: Path, tmp_path: Path, callbacks: Any) -> None:
    with pytest.raises(jt.ConfigError, match="callbacks: expected a list of objects whose classes"):
        jt.train(config(model, tmp_path), data=ROWS, callbacks=callbacks)
    assert not any(tmp_path.iterdir())


def test_a_method_that_nothing_calls(model: Path, tmp_path: Path) -> None:
    class Misspelt(jt.Callback):
        def on_evaluate(self, row: dict[str, Any]) -> None: ...

    with pytest.raises(jt.ConfigError, match=r"Misspelt\.on_evaluate is no method .* 'on_evaluati"):
        jt.train(config(model, tmp_path), data=ROWS, callbacks=[Misspelt()])


def test_a_metric_of_ones_own_is_a_column(
    model: Path, tmp_path: Path, plain: list[dict[str, Any]]
) -> None:
    seen: list[Any] = []

    def letters(prompts: list[str], references: list[str], responses: list[str]) -> float:
        seen.append((prompts, references, len(responses)))
        return 7

    result = jt.train(
        config(model, tmp_path), data=ROWS, eval_data=HELD_OUT, metrics={"letters": letters}
    )
    assert seen == [(["Where are you?"], ["In Rome"], 1)] * 2
    rows = metrics(tmp_path)
    assert [row.pop("letters") for row in rows if row["kind"] == "eval"] == [7.0, 7.0]
    assert rows == plain
    assert result.metrics["eval"]["letters"] == 7.0
    with pytest.raises(jt.CallbackError, match="metric broken: ZeroDivisionError"):
        jt.train(
            config(model, tmp_path / "other"), data=ROWS, eval_data=HELD_OUT,
            metrics={"broken": lambda *texts: 1 / 0},
        )  # fmt: skip
    with pytest.raises(jt.CallbackError, match="metric words: TypeError: expected a number; got"):
        jt.train(
            config(model, tmp_path / "words"), data=ROWS, eval_data=HELD_OUT,
            metrics={"words": lambda *texts: "good"},
        )  # fmt: skip
    for wrong in ([letters], {"letters": 3}):
        with pytest.raises(jt.ConfigError, match="metrics: expected a dict of functions"):
            jt.train(config(model, tmp_path), data=ROWS, metrics=wrong)  # type: ignore[arg-type]
    with pytest.raises(jt.ConfigError, match="metrics: eval_loss: eval rows have that"):
        jt.train(config(model, tmp_path), data=ROWS, metrics={"eval_loss": letters})
    with pytest.raises(jt.ConfigError, match="metrics: need held-out data"):
        jt.train(config(model, tmp_path / "none", eval_steps=None), data=ROWS,
                 metrics={"letters": letters})  # fmt: skip
