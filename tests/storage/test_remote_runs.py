"""Runs whose data, model and output lie in a store: killed, damaged, cut off, gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from multihost import runs

from jaxtune import convert, evaluate, report, train
from jaxtune.cli import BAD_INPUT, STOPPED
from jaxtune.storage import object_store
from jaxtune.storage.object_store import join
from jaxtune.training.checkpoint.remote import steps_of

pytestmark = pytest.mark.slow

KILL = """
import os
from jaxtune.training import loop
was = loop.Loop._next
def struck(self, feed, step):
    if step == {step}:
        os.kill(os.getpid(), 9)
    return was(self, feed, step)
loop.Loop._next = struck
"""
IMPATIENT = "from jaxtune.storage import object_store\nobject_store._PAUSES = ()"


@pytest.fixture(scope="module")
def calm(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on a local disk, never disturbed."""
    return runs.undisturbed(material, tmp_path_factory.mktemp("calm") / "out", devices=2)


def put_folder(folder: Path, url: str) -> None:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    object_store.put_all(folder, names, url)


def flags(bucket: str) -> list[str]:
    """The run of `material`, everything in the bucket."""
    return runs.flags(
        Path("/nowhere"), Path("/nowhere"), model_name_or_path=join(bucket, "m/model"),
        dataset=join(bucket, "m/train.jsonl"), eval_datasets=join(bucket, "m/eval.jsonl"),
        output_dir=join(bucket, "run"),
    )  # fmt: skip


def rows_of(url: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in object_store.read(join(url, "metrics.jsonl")).splitlines()]
    return [{k: v for k, v in row.items() if k not in runs.CLOCK} for row in rows]


def contents(url: str) -> dict[str, bytes]:
    """All files of an export; the card says where the run lay."""
    found = {
        object_store.name_of(item.url): object_store.read(item.url)
        for item in object_store.listed(url)
    }
    return {name: b"" if name == "README.md" else data for name, data in found.items()}


def local_contents(folder: Path) -> dict[str, bytes]:
    return {p.name: b"" if p.name == "README.md" else p.read_bytes() for p in folder.iterdir()}


def on_an_empty_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path / name))


@pytest.mark.parametrize("scheme", ["s3", pytest.param("gs", marks=pytest.mark.nightly)])
def test_killed_and_gone_on_with_on_an_empty_disk(
    scheme: str,
    request: pytest.FixtureRequest,
    material: Path,
    calm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bucket: str = request.getfixturevalue(scheme)
    put_folder(material, join(bucket, "m"))
    run = join(bucket, "run")

    on_an_empty_disk(tmp_path, monkeypatch, "first")
    host = runs.Host(flags(bucket), devices=2, before=KILL.format(step=11))
    assert host.end() == -9, host.stderr
    known = steps_of(run)
    assert known[:1] == [4]

    on_an_empty_disk(tmp_path, monkeypatch, "second")
    host = runs.Host(flags(bucket), devices=2)
    assert host.end() == 0, host.stderr
    assert f"going on after step {known[-1]}" in host.stderr
    assert f"{run}: has all of the run" in host.stderr
    assert "Traceback" not in host.stderr
    assert steps_of(run) == [8, 12]
    assert rows_of(run) == runs.rows_of(calm)
    assert contents(join(run, "hf")) == local_contents(calm / "hf")
    assert len(object_store.read(join(run, "starts.jsonl")).splitlines()) == 2
    assert object_store.find(join(run, "report.html"))

    # A flipped bit in the newest checkpoint, and once more an empty disk.
    on_an_empty_disk(tmp_path, monkeypatch, "third")
    data = [i for i in object_store.listed(join(run, "checkpoints", 12)) if i.size > 1000]
    flipped = bytearray(object_store.read(data[0].url))
    flipped[700] ^= 4
    object_store.put_bytes(bytes(flipped), data[0].url)
    host = runs.Host(flags(bucket), devices=2)
    assert host.end() == 0, host.stderr
    assert f"{run}/checkpoints/12: is damaged and not used" in host.stderr
    assert "going on after step 8" in host.stderr
    assert steps_of(run) == [8, 12]
    assert rows_of(run) == runs.rows_of(calm)
    assert contents(join(run, "hf")) == local_contents(calm / "hf")

    # Read by the other doors.
    capsys.readouterr()
    asked = ["--dataset", join(bucket, "m/eval.jsonl"), "--json", "--max_length", "64"]
    scores = []
    for name in (run, join(run, "checkpoints", 12), str(calm / "hf")):
        assert evaluate.main(["--model_name_or_path", name, *asked]) == 0, capsys.readouterr().err
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[0] == scores[2]
    assert scores[1]["eval_loss"] == pytest.approx(scores[2]["eval_loss"], rel=1e-6)
    assert convert.main([run, join(bucket, "made"), "--step", "12"]) == 0
    weights = local_contents(calm / "hf")["model.safetensors"]
    assert contents(join(bucket, "made"))["model.safetensors"] == weights
    assert report.main([run]) == 0
    assert f"put: {run}/report.html" in capsys.readouterr().err


def test_a_store_that_is_gone_for_a_while(
    s3: str, wire: Any, material: Path, calm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on to its end and says what is not saved; the same command makes it good."""
    put_folder(material, join(s3, "m"))
    run = join(s3, "run")
    wire["s3"].asked.clear()

    def fault(method: str, path: str) -> object:
        """Of step 8, until step 12 is being written."""
        later = any("/checkpoints/12/" in other for _, other in wire["s3"].asked)
        gone = method in ("PUT", "POST") and "/checkpoints/8/" in path and not later
        return 503 if gone else None

    wire["s3"].fault = fault
    host = runs.Host(flags(s3), devices=2, before=IMPATIENT)
    assert host.end() == 0, host.stderr
    assert "step 8 is not there" in host.stderr
    assert "The run goes on" in host.stderr
    assert steps_of(run) == [8, 12]
    assert rows_of(run) == runs.rows_of(calm)

    wire["s3"].fault = lambda method, path: (
        503 if method in ("PUT", "POST") and "/run/hf/" in path else None
    )
    host = runs.Host(flags(s3), devices=2, before=IMPATIENT)
    assert host.end() == STOPPED, host.stderr  # the store may answer again
    assert "/run/hf/" in host.stderr.splitlines()[-1]
    assert not object_store.find(join(run, "hf/config.json"))

    wire["s3"].fault = lambda method, path: None
    host = runs.Host(flags(s3), devices=2)
    assert host.end() == 0, host.stderr
    assert contents(join(run, "hf")) == local_contents(calm / "hf")


def test_a_config_in_a_store(memory: str, capsys: pytest.CaptureFixture[str]) -> None:
    object_store.put_bytes(b"seed: no number\n", join(memory, "config.yaml"))
    assert train.main(["--config", join(memory, "config.yaml")]) == BAD_INPUT
    assert "seed" in capsys.readouterr().err
    assert train.main(["--config", join(memory, "none.yaml")]) == BAD_INPUT
    assert "none.yaml: cannot read the config: there is no such object" in capsys.readouterr().err
