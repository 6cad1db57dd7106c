"""metrics.jsonl across a crash, the meter, and sums over batches."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from jaxtune.config import ConfigError
from jaxtune.data.dataset import EvalBatch
from jaxtune.ops.cross_entropy import Sums
from jaxtune.parallel.mesh import make_mesh
from jaxtune.storage.jsonl import last_rows
from jaxtune.training import metrics
from jaxtune.training.evaluation import Totals, evaluate
from jaxtune.training.metrics import Meter, MetricsWriter, Spikes


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_rows_after_the_restored_step_and_a_half_written_line_are_dropped(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resumed_at=0)
    for step in (1, 2, 3):
        writer.write({"kind": "train", "step": step, "loss": 1.0 / step})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "tr')  # killed while writing
    writer = MetricsWriter(tmp_path, resumed_at=2)
    writer.write({"kind": "train", "step": 3, "loss": 0.25})
    writer.close()
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 0.25)]


def test_what_is_not_finite_is_text_in_json_and_a_number_again_when_read(tmp_path: Path) -> None:
    def refused(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    row = {"kind": "eval", "step": 2, "eval_loss": math.nan, "eval_perplexity": math.inf,
           "by_dataset": {"a": {"eval_loss": -math.inf, "eval_tokens_trained": 3}}}  # fmt: skip
    writer = MetricsWriter(tmp_path, resumed_at=0)
    writer.write(row)
    writer.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = json.loads(line, parse_constant=refused)
    assert (found["eval_loss"], found["eval_perplexity"]) == ("nan", "inf")
    assert found["by_dataset"] == {"a": {"eval_loss": "-inf", "eval_tokens_trained": 3}}
    again = last_rows(tmp_path / "metrics.jsonl", 2)["eval"]
    assert repr(again) == repr(row)


def test_the_last_rows_up_to_a_step_and_the_evaluation_of_the_best(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert last_rows(file, 9) == {}
    every = [(1, "train"), (2, "train"), (2, "eval"), (3, "train"), (4, "eval"), (5, "train")]
    file.write_text("".join(f'{{"kind": "{kind}", "step": {n}}}\n' for n, kind in every) + '{"ki')

    def steps(step: int, best: int | None = None) -> dict[str, int]:
        return {kind: row["step"] for kind, row in last_rows(file, step, best=best).items()}

    assert steps(9) == {"train": 5, "eval": 4}
    assert steps(3) == {"train": 3, "eval": 2}
    assert steps(4, best=4) == {"train": 3, "eval": 4}
    assert steps(3, best=3) == {"train": 3}


def test_what_an_evaluation_wrote_that_is_due_again_is_dropped(tmp_path: Path) -> None:
    for due, kept in ((False, ["train", "train", "eval"]), (True, ["train", "train"])):
        writer = MetricsWriter(tmp_path, resumed_at=0)
        for step, kind in ((1, "train"), (2, "train"), (2, "eval"), (3, "train")):
            writer.write({"kind": kind, "step": step})
        writer.close()
        MetricsWriter(tmp_path, resumed_at=2, due=due).close()
        assert [row["kind"] for row in rows(tmp_path)] == kept


def test_a_fresh_run_forgets_the_rows_of_a_run_that_saved_nothing(tmp_path: Path) -> None:
    MetricsWriter(tmp_path, resumed_at=0).write({"kind": "train", "step": 1, "loss": 9.0})
    MetricsWriter(tmp_path, resumed_at=0).close()
    assert rows(tmp_path) == []


def test_tensorboard_files_are_written_where_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    writer = MetricsWriter(tmp_path, resumed_at=0, report_to=("tensorboard",))
    writer.write({"kind": "train", "step": 1, "loss": 2.0, "mfu": None})
    writer.close()
    (file,) = (tmp_path / "tensorboard").glob("events*")
    assert b"train/loss" in file.read_bytes()


def test_the_meter_leaves_out_compilation_and_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    meter = Meter(flops_per_token=1e9, device_kind="TPU v5 lite", devices=2)
    assert meter.read() == (None, None, None, None)
    now[0] = 60.0  # compiling
    meter.waited(50.0)
    meter.step(1000)
    assert meter.read() == (None, None, None, None)
    now[0] = 61.0
    meter.waited(0.5)
    meter.step(1000)
    now[0] = 62.0
    meter.step(2000)
    rate, mfu, seconds, waited = meter.read()
    assert (rate, seconds, waited) == (1500, 1.0, 0.25)
    assert mfu == pytest.approx(1500 * 1e9 / (2 * 197e12))
    now[0] = 100.0  # an evaluation
    meter.pause()
    meter.step(900)
    now[0] = 101.0
    meter.step(500)
    assert meter.read()[0] == 500
    assert meter.read() == (None, None, None, None)  # no step since
    assert Meter(flops_per_token=1, device_kind="cpu", devices=1).read()[1] is None


def test_a_loss_that_jumps_is_noticed_once() -> None:
    spikes = Spikes()
    rng = np.random.default_rng(0)
    calm = [2.0 + 0.05 * value for value in rng.normal(size=60)]
    assert [spikes.notice(loss) for loss in calm] == [None] * 60
    assert spikes.notice(4.0) == pytest.approx(2.0, abs=0.05)
    assert spikes.notice(4.0) is None  # once in 20 steps
    by_heart = Spikes()
    assert [by_heart.notice(loss) for loss in [0.001] * 60 + [0.06]] == [None] * 61
    assert [Spikes().notice(9.0 - step) for step in range(9)] == [None] * 9  # too early to tell


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resumed_at=0)
    writer._file = open("/dev/full", "a")  # noqa: SIM115 (the writer closes it)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: cannot be written: No space left"):
        writer.write({"kind": "train", "step": 1})
    writer.close()


def test_a_board_that_is_not_installed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, module in (("wandb", "wandb"), ("tensorboard", "tensorboardX")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ConfigError, match=rf"pip install 'jaxtune\[{name}\]'"):
            MetricsWriter(tmp_path, resumed_at=0, report_to=(name,))


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: what it would send lies in the run directory."""
    pytest.importorskip("wandb")
    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("API_KEY", "not-to-be-seen")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    for start in (0, 1):
        time.sleep(1.1 * start)  # its folders are named by the second
        writer = MetricsWriter(
            tmp_path, resumed_at=start, report_to=("wandb",), settings={"learning_rate": 0.5}
        )
        writer.write({"kind": "train", "step": start + 1, "loss": 2.0, "mfu": None})
        writer.close()
    kept = (tmp_path / "wandb-run-id.txt").read_text()
    folders = [path for path in (tmp_path / "wandb").iterdir() if path.name.startswith("offline")]
    assert len(folders) == 2
    for folder in folders:
        assert folder.name.endswith(kept)
        (file,) = folder.glob("*.wandb")
        assert b"train/loss" in file.read_bytes()
        assert b"not-to-be-seen" not in file.read_bytes()


class Batch(NamedTuple):
    inputs: Any
    weights: Any


def test_evaluation_is_invariant_to_batching() -> None:
    """One row of loss 2 x 10 tokens and one of loss 4 x 1000: 3.980, whatever the batches."""
    losses = np.array([2.0, 4.0, 0.0], np.float32)
    counts = np.array([10, 1000, 0])
    weights = (np.arange(1000) < counts[:, None]).astype(np.float32)
    index = np.tile(np.arange(3)[:, None], (1, 1000))

    def eval_step(trained: Any, frozen: Any, batch: Any) -> Sums:
        ce = losses[np.asarray(batch.inputs)] * np.asarray(batch.weights)
        weight = np.asarray(batch.weights).sum()
        return Sums(ce.sum(), weight, weight / 2)

    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1}, make_devices())

    def batch(low: int, high: int) -> EvalBatch:
        trained = int(np.count_nonzero(weights[low:high]))

        def rows(first: int, last: int) -> Batch:
            return Batch(index[low:high][first:last], weights[low:high][first:last])

        return EvalBatch(rows, high - low, 1000, trained)

    whole = evaluate(eval_step, {}, {}, [batch(0, 3)], mesh=mesh)
    single = evaluate(
        eval_step, {}, {},
        [batch(i, i + 1) for i in range(3)], mesh=mesh,
    )  # fmt: skip
    assert whole == single
    row = whole.row()
    assert row["eval_loss"] == pytest.approx(4020 / 1010)
    assert row["eval_perplexity"] == pytest.approx(math.exp(4020 / 1010))
    assert row["eval_token_accuracy"] == 0.5
    assert row["eval_tokens_trained"] == 1010


def make_devices() -> list:
    import jax

    return jax.devices()[:1]


def test_a_loss_that_is_not_a_number_has_no_perplexity_either() -> None:
    assert math.isnan(Totals(math.nan, 2, 3, 4).row()["eval_perplexity"])
    assert Totals(2000, 2, 3, 4).row()["eval_perplexity"] == math.inf


def test_no_trained_tokens_is_no_division_by_zero() -> None:
    assert Totals().row()["eval_loss"] == 0.0
    assert (Totals(1, 2, 3, 4) + Totals(1, 1, 1, 1)) == Totals(2, 3, 4, 5)


def test_rows_that_a_resumed_run_keeps(tmp_path: Path) -> None:
    """A line separator of Unicode is text; what is no row goes, wherever it stands."""
    rows = ['{"step": 1, "response": "a\u2028b"}', '{"step": 2}', '{"step": 3}']
    odd = [b'{"step": 2, "x": "\xfd"}', b"[1]", b'{"step": "one"}', b"{}", b'{"step": 1']
    file = tmp_path / "samples.jsonl"
    file.write_bytes(b"\n".join([row.encode() for row in rows] + odd))
    metrics.keep_rows_up_to(file, 2)
    assert file.read_bytes() == "".join(f"{row}\n" for row in rows[:2]).encode()
