"""Runs of several processes with gloo between them: as one process, whatever befalls them."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from multihost import runs
from safetensors.numpy import load_file

pytestmark = pytest.mark.xdist_group("multihost")  # one worker: the two cores are shared as it is

# Says which rows of each batch this host makes.
COUNTED = """
from jaxtune.data import dataset
make = dataset.Batches.batch_rows
def counted(self, step, low, high):
    kind = "ROWS" if self._order == "shuffled" else "EVAL"
    print(kind, step, low, high, flush=True)
    return make(self, step, low, high)
dataset.Batches.batch_rows = counted
"""
# Once the given step's update is done, on one host; a checkpoint before it is complete. Steps are
# made as slow as real ones: JAX looks for signals once a second.
AT_STEP = """
import os, signal, time
from jaxtune.training import loop
read = loop.Loop._read
def struck(self):
    if HOST == {host} and self._pending and self._pending[0] + 1 == {step}:
        self.checkpoints.wait()
        os.kill(os.getpid(), signal.{signal})
    time.sleep({seconds})
    read(self)
loop.Loop._read = struck
"""
# One host is told to stop when an evaluation begins; batches take as long as large ones do.
IN_EVALUATION = """
import os, signal, time
from jaxtune.training import loop
evaluate = loop.evaluate
def slowly(step, trained, frozen, batches, **options):
    def each():
        for at, batch in enumerate(batches):
            if HOST == 1 and at == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.7)
            yield batch
    return evaluate(step, trained, frozen, each(), **options)
loop.evaluate = slowly
"""


def assert_same_run(out: Path, alone: Path) -> None:
    """Step by step the same data and the same numbers, f32 sums in another order aside."""
    rows, expected = runs.rows_of(out), runs.rows_of(alone)
    assert [(r["kind"], r["step"]) for r in rows] == [(r["kind"], r["step"]) for r in expected]
    for row, other in zip(rows, expected, strict=True):
        for name in ("tokens_total", "tokens_trained", "examples_seen", "eval_tokens_trained"):
            assert row.get(name) == other.get(name)
        loss = "loss" if row["kind"] == "train" else "eval_loss"
        assert row[loss] == pytest.approx(other[loss], abs=1e-5), row["step"]
    ours, theirs = (load_file(o / "hf" / "model.safetensors") for o in (out, alone))
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name], values, atol=1e-5, err_msg=name)


def test_two_hosts_are_one_run(material: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hosts = runs.start(runs.flags(material, out), hosts=2, devices=4, before=COUNTED)
    assert [host.end() for host in hosts] == [0, 0], hosts[0].stderr + hosts[1].stderr
    assert_same_run(out, alone)
    # Each host made half of every batch, and only the first one spoke.
    for host, (low, high) in zip(hosts, ((0, 4), (4, 8)), strict=True):
        said = host.stdout.splitlines()
        trained = [line for line in said if line.startswith("ROWS")]
        assert trained == [f"ROWS {step} {low} {high}" for step in range(12)]
        # Of the two evaluations too: 4 examples, a row for each of 4 devices.
        evaluated = [line for line in said if line.startswith("EVAL")]
        assert evaluated == [f"EVAL 0 {low // 2} {high // 2}"] * 2
    assert "step 12/12" in hosts[0].stderr
    for word in ("data\n", "training: ", "step ", "model: "):  # the others are silent
        assert word in hosts[0].stderr
        assert word not in hosts[1].stderr


@pytest.mark.slow
def test_killed_stopped_and_resumed_by_other_numbers_of_hosts(
    material: Path, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    four = runs.start(
        runs.flags(material, out, **{"hosts.heartbeat_timeout_seconds": 10}),
        hosts=4, devices=4, before=AT_STEP.format(host=2, step=5, signal="SIGKILL", seconds=0),
    )  # fmt: skip
    four[2].process.wait(240)
    killed = time.monotonic()
    codes = [host.end(60) for host in four]
    assert time.monotonic() - killed < 60  # wanted: 30, with cores of their own
    assert codes == [75, 75, -9, 75], four[0].stderr
    assert "host 0 of 4: host 2 was lost" in four[0].stderr
    # On a busy machine one that is slow to end may be named beside it, or by the others.
    for number in (0, 1, 3):
        said = four[number].stderr
        assert re.search(rf"host {number} of 4: host .* was lost", said), (number, said)
        assert "goes on from the last checkpoint" in said

    two = runs.start(
        runs.flags(material, out), hosts=2, devices=4,
        before=AT_STEP.format(host=1, step=5, signal="SIGTERM", seconds=0.7),
    )  # fmt: skip
    assert [host.end() for host in two] == [75, 75], two[0].stderr + two[1].stderr
    assert "going on after step 4" in two[0].stderr
    saved = max(int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit())
    assert 5 <= saved < 12
    for host in two:
        assert f"after step {saved}, which is saved" in host.stderr

    (one,) = runs.start(runs.flags(material, out), hosts=1, devices=1)
    assert one.end() == 0, one.stderr
    assert f"going on after step {saved}" in one.stderr
    assert_same_run(out, alone)


@pytest.mark.slow
def test_all_hosts_leave_an_evaluation_at_the_same_batch(material: Path, tmp_path: Path) -> None:
    more = {"eval_datasets": material / "train.jsonl", "save_steps": 100}  # ten batches
    (one,) = runs.start(runs.flags(material, tmp_path / "alone", **more), hosts=1, devices=4)
    argv = runs.flags(material, tmp_path / "out", **more)
    two = runs.start(argv, hosts=2, devices=4, before=IN_EVALUATION)
    assert [host.end() for host in (one, *two)] == [0, 75, 75], two[0].stderr + two[1].stderr
    for host in two:
        assert "after step 6, which is saved" in host.stderr
        assert "goes on from there with its evaluation" in host.stderr
    assert [row["kind"] for row in runs.rows_of(tmp_path / "out")] == ["train"] * 6
    again = runs.start(argv, hosts=2, devices=4)
    assert [host.end() for host in again] == [0, 0], again[0].stderr + again[1].stderr
    assert_same_run(tmp_path / "out", tmp_path / "alone")


def test_a_host_that_fails_ends_the_others_with_its_reason(material: Path, tmp_path: Path) -> None:
    """Host 1 finds a broken file where host 0 finds a good one: each host reads its own disk."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps({"instruction": "a"}) + "\n")
    before = f"if HOST == 1: sys.argv[sys.argv.index('--dataset') + 1] = {str(broken)!r}"
    hosts = runs.start(runs.flags(material, tmp_path / "out"), hosts=2, devices=2, before=before)
    assert [host.end(60) for host in hosts] == [2, 2], hosts[0].stderr
    assert "jaxtune train: host 1 of 2: " in hosts[1].stderr
    assert "host 1 has ended, so this one does too. It said: " in hosts[0].stderr
    assert "broken.jsonl" in hosts[0].stderr


def test_hosts_that_would_not_run_the_same_say_what_differs(material: Path, tmp_path: Path) -> None:
    """Host 1 reads other answers from a file of the same name, fewer rows to evaluate on, and has
    another learning rate: all of this would train, or wait, without a word."""
    rows = [json.loads(line) for line in (material / "train.jsonl").read_text().splitlines()]
    for name, kept in (("train", rows), ("eval", rows[:2])):
        other = ({**row, "output": "In Bonn"} for row in kept)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in other))
    files = {"--dataset": tmp_path / "train.jsonl", "--eval_datasets": tmp_path / "eval.jsonl"}
    before = "".join(
        f"if HOST == 1: sys.argv[sys.argv.index({flag!r}) + 1] = {str(value)!r}\n"
        for flag, value in {**files, "--learning_rate": "0.05"}.items()
    )
    hosts = runs.start(runs.flags(material, tmp_path / "out"), hosts=2, devices=2, before=before)
    assert [host.end(300) for host in hosts] == [2, 2], hosts[0].stderr + hosts[1].stderr
    for host in hosts:
        assert "hosts: they are not about to run the same: " in host.stderr
        assert "learning_rate is 0.05 on host 1 and 0.01 on host 0" in host.stderr
        assert "what is trained on (data, tokenizer, template, seed, rows) is" in host.stderr
        assert "what is evaluated on is" in host.stderr
        assert "the base model" not in host.stderr
        assert "datasets is" not in host.stderr  # by what it holds, wherever it lies
        assert "Traceback" not in host.stderr
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("before", "code", "said"),
    [
        ("from jaxtune.training import build as program\n"
         "def build(*_): raise KeyboardInterrupt\n"
         "if HOST == 1: program.build = build", 130, "interrupted."),
        ("from jaxtune.parallel import heartbeat\n"
         "from jaxtune.training import loop\n"
         "import jax.numpy\n"
         "blamed = lambda *_: print('BLAMED', file=sys.stderr)\n"
         "if HOST == 1: heartbeat.Heartbeat._blame = blamed\n"
         "def step(*_): jax.numpy.zeros(2**45).block_until_ready()\n"
         "if HOST == 1: loop.Loop._next = step", 2, "out of memory on a device: RESOURCE_"),
    ],
    ids=["interrupted", "out of memory"],
)  # fmt: skip
def test_the_others_hear_why_a_host_has_ended(
    before: str, code: int, said: str, material: Path, tmp_path: Path
) -> None:
    hosts = runs.start(runs.flags(material, tmp_path / "out"), hosts=2, devices=2, before=before)
    assert [host.end(300) for host in hosts] == [code, code], hosts[0].stderr + hosts[1].stderr
    assert f"jaxtune train: host 1 of 2: {said}" in hosts[1].stderr
    assert f"host 1 has ended, so this one does too. It said: {said}" in hosts[0].stderr
    assert "BLAMED" not in hosts[1].stderr


@pytest.mark.slow
@pytest.mark.parametrize("lora", [pytest.param(0, marks=pytest.mark.nightly), 2])
def test_sample_prompts_on_two_hosts_are_answered_as_on_one(
    lora: int, material: Path, alone: Path, tmp_path: Path
) -> None:
    found = []
    for count in (1, 2):
        out = tmp_path / str(count)
        prompts = json.dumps(["Where is number 3?", "Where is the very last number of them?"])
        more = {"sample_prompts": prompts, "max_steps": 6, "eval_steps": 3, "export": "false"}
        if lora:
            more |= {"lora.r": lora, "init": "pretrained", "model_name_or_path": alone / "hf"}
        split = {"mesh.data": 1, "mesh.fsdp": 2}
        hosts = runs.start(runs.flags(material, out, **more, **split), hosts=count, devices=2)
        assert [host.end(300) for host in hosts] == [0] * count, [host.stderr for host in hosts]
        found.append((out / "samples.jsonl").read_text().splitlines())
    assert [json.loads(row)["step"] for row in found[1]] == [3, 3, 6, 6]
    assert found[0] == found[1]


@pytest.mark.slow
def test_answers_on_two_hosts_are_those_of_one(material: Path, alone: Path) -> None:
    found = []
    for count in (1, 2):
        argv = ["--model_name_or_path", str(alone / "hf"), "--dataset",
                str(material / "eval.jsonl"), "--max_length", "64", "--json", "--generate", "4",
                "--max_new_tokens", "8"]  # fmt: skip
        hosts = runs.start(argv, hosts=count, devices=2, door="evaluate")
        assert [host.end(300) for host in hosts] == [0] * count, [host.stderr for host in hosts]
        assert not any(host.stdout for host in hosts[1:])
        found.append([row["response"] for row in json.loads(hosts[0].stdout)["generations"]])
    assert len(found[0]) == 4
    assert found[0] == found[1]


def test_hosts_that_would_evaluate_other_things_say_so(
    material: Path, alone: Path, tmp_path: Path
) -> None:
    """Host 1 has another answer in a file of the same name, and asks more questions."""
    rows = [json.loads(line) for line in (material / "eval.jsonl").read_text().splitlines()]
    rows[0]["output"] = "In Bonn"
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--model_name_or_path", str(alone / "hf"), "--dataset", str(material / "eval.jsonl"),
            "--max_length", "64", "--generate", "2"]  # fmt: skip
    before = "".join(
        f"if HOST == 1: sys.argv[sys.argv.index({flag!r}) + 1] = {str(value)!r}\n"
        for flag, value in {"--dataset": tmp_path / "eval.jsonl", "--generate": 3}.items()
    )
    hosts = runs.start(argv, hosts=2, devices=2, door="evaluate", before=before)
    assert [host.end() for host in hosts] == [2, 2], hosts[0].stderr + hosts[1].stderr
    for host in hosts:
        assert "generate is 3 on host 1 and 2 on host 0" in host.stderr
        assert "what is evaluated on is" in host.stderr
        assert "what is asked is" in host.stderr
        assert "model 0" not in host.stderr


def test_evaluation_on_two_hosts_is_printed_by_one(material: Path, alone: Path) -> None:
    argv = ["--model_name_or_path", str(alone / "hf"), "--dataset", str(material / "eval.jsonl"),
            "--max_length", "64", "--packing", "false", "--json"]  # fmt: skip
    hosts = runs.start(argv, hosts=2, devices=2, door="evaluate")
    assert [host.end() for host in hosts] == [0, 0], hosts[0].stderr
    assert hosts[1].stdout == ""
    found, expected = json.loads(hosts[0].stdout), runs.rows_of(alone)[-1]
    for name in ("eval_loss", "eval_tokens_trained"):
        assert found[name] == pytest.approx(expected[name], abs=1e-5)
