"""Two processes with gloo between them, no folder in common, everything in an emulated store."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from multihost import runs
from safetensors.numpy import load

from jaxtune.cli import BAD_INPUT
from jaxtune.storage import object_store
from jaxtune.storage.object_store import join
from jaxtune.training.checkpoint import integrity, remote_shards
from jaxtune.training.checkpoint.remote import steps_of

# One worker: the two cores are shared as it is.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("multihost")]

# A disk of its own for each host. Host `who` is killed before step `kill`.
APART = """
import os
os.environ["JAXTUNE_CACHE"] = os.path.join({disks!r}, "host-HOST")
from jaxtune.storage import object_store
from jaxtune.training import loop
was = loop.Loop._next
def struck(self, feed, step):
    if (HOST, step) == ({who}, {kill}):
        self.checkpoints.wait()
        os.kill(os.getpid(), 9)
    return was(self, feed, step)
loop.Loop._next = struck
"""
# The store refuses what host 1 puts of step 8.
REFUSED = """
put = object_store.put
def refused(file, url):
    if HOST == 1 and "/checkpoints/8/" in url:
        raise object_store.StoreError(f"{url}: cannot be written: Access Denied.")
    put(file, url)
object_store.put = refused
"""
# Each evaluation is worse than the one before.
FIRST_IS_BEST = """
after = loop.EvalHistory.after
loop.EvalHistory.after = lambda self, loss, step: after(self, float(step), step)
"""


@pytest.fixture(scope="module")
def calm(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on a local disk, by one process, never disturbed."""
    return runs.undisturbed(material, tmp_path_factory.mktemp("calm") / "out", devices=4)


def ended(
    material: Path,
    run: str,
    disks: Path,
    *,
    hosts: int = 2,
    kill: int = 0,
    who: int = 1,
    more: str = "",
    fsdp: int = 2,
    **options: object,
) -> tuple[list[int], list[str]]:
    """The exit codes of a run with its output at `run`, and what each host said. With an `fsdp` of
    4 no host holds whole arrays."""
    split = {"mesh.data": 4 // fsdp, "mesh.fsdp": fsdp, "hosts.heartbeat_timeout_seconds": 10}
    flags = runs.flags(material, Path("/nowhere"), output_dir=run, **split, **options)
    before = APART.format(disks=str(disks), kill=kill, who=who) + more
    processes = runs.start(flags, hosts=hosts, devices=4, before=before)
    return [p.end(300) for p in processes], [p.stderr for p in processes]


def assert_same_run(run: str, calm: Path) -> None:
    rows = [json.loads(line) for line in object_store.read(join(run, "metrics.jsonl")).splitlines()]
    expected = runs.rows_of(calm)
    assert [(r["kind"], r["step"]) for r in rows] == [(r["kind"], r["step"]) for r in expected]
    for row, other in zip(rows, expected, strict=True):
        loss = "loss" if row["kind"] == "train" else "eval_loss"
        assert row[loss] == pytest.approx(other[loss], abs=1e-5), row["step"]
    ours = load(object_store.read(join(run, "hf", "model.safetensors")))
    for name, values in load((calm / "hf" / "model.safetensors").read_bytes()).items():
        np.testing.assert_allclose(ours[name], values, atol=1e-5, err_msg=name)


def chunks_of(names: list[str]) -> set[str]:
    return set(remote_shards._chunks(dict.fromkeys(names, (0, ""))))


def on_disk(disk: Path, step: int) -> set[str]:
    (place,) = disk.glob(f"runs/*/checkpoints/{step}")
    return set(integrity.files_of(place))


def test_killed_damaged_and_gone_on_with_on_empty_disks(
    s3: str, material: Path, calm: Path, tmp_path: Path
) -> None:
    run = join(s3, "run")
    codes, said = ended(material, run, tmp_path / "first", kill=10)
    assert codes == [75, -9], said
    assert steps_of(run) == [4, 8]
    place = join(run, "checkpoints", 8)
    there = {object_store.inside(item.url, place): item.url for item in object_store.listed(place)}
    chunks = chunks_of(list(there))
    first, second = (on_disk(tmp_path / "first" / f"host-{n}", 8) & chunks for n in (0, 1))
    assert first | second == chunks
    assert not first & second  # each wrote its own part, and has no more
    assert len(second) >= len(chunks) // 3

    flipped = bytearray(object_store.read(there[min(second)]))
    flipped[20] ^= 4
    object_store.put_bytes(bytes(flipped), there[min(second)])
    codes, said = ended(material, run, tmp_path / "second")
    assert codes == [0, 0], said
    assert "checkpoints/8: is damaged and not used" in said[0]
    assert "SHA-256" in said[0]
    assert "going on after step 4" in said[0]
    assert steps_of(run) == [8, 12]
    assert_same_run(run, calm)


def test_two_hosts_gone_on_with_by_one(gs: str, material: Path, calm: Path, tmp_path: Path) -> None:
    run = join(gs, "run")
    codes, said = ended(material, run, tmp_path / "first", kill=6, who=0)
    assert codes == [-9, 75], said
    assert steps_of(run) == [4]
    codes, said = ended(material, run, tmp_path / "first", hosts=1)
    assert codes == [0], said
    assert "going on after step 4" in said[0]
    assert_same_run(run, calm)


def test_one_host_gone_on_with_by_two(s3: str, material: Path, calm: Path, tmp_path: Path) -> None:
    run = join(s3, "run")
    codes, said = ended(material, run, tmp_path / "first", hosts=1, kill=6, who=0)
    assert codes == [-9], said
    codes, said = ended(material, run, tmp_path / "first")
    assert codes == [0, 0], said
    assert "going on after step 4" in said[0]
    assert f"{run}: has all of the run" in said[0]
    assert said[1].count("jaxtune") == 0  # only the first one speaks
    assert_same_run(run, calm)


def test_a_store_that_refuses_one_host_ends_both(s3: str, material: Path, tmp_path: Path) -> None:
    run = join(s3, "run")
    codes, said = ended(material, run, tmp_path, more=REFUSED)
    assert codes == [BAD_INPUT, BAD_INPUT], said
    assert "host 1 of 2: " in said[1].splitlines()[-1]
    assert "Access Denied. A checkpoint could not be put there. The same command goes" in said[1]
    assert "goes on from step 4." in said[1]
    assert "host 1 has ended, so this one does too. It said: " in said[0]
    assert "Traceback" not in said[0] + said[1]
    assert steps_of(run) == [4]


def test_adapters_the_best_step_and_samples(s3: str, material: Path, tmp_path: Path) -> None:
    """What is read back while a run goes on, and what host 0 alone writes."""
    run = join(s3, "run")
    options = {
        "lora.r": 4, "learning_rate": 0.3, "lr_scheduler_type": "constant", "max_steps": 9,
        "eval_steps": 3, "save_steps": 3, "load_best_model_at_end": "true", "save_total_limit": 1,
        "sample_prompts": json.dumps(["Where is number 3?"]), "init": "pretrained",
        "model_name_or_path": tmp_path / "made" / "hf",
    }  # fmt: skip
    base = runs.flags(material, tmp_path / "made", max_steps=1, eval_datasets=None, eval_steps=None)
    made = runs.Host(base, devices=1)
    assert made.end() == 0, made.stderr
    codes, said = ended(material, run, tmp_path / "disks", more=FIRST_IS_BEST, **options)
    assert codes == [0, 0], said
    assert "best: step 3, eval_loss 3.0000; it is exported" in said[0]
    assert steps_of(run) == [3, 9]
    samples = object_store.read(join(run, "samples.jsonl")).splitlines()
    assert [json.loads(row)["step"] for row in samples] == [3, 6, 9]
    names = {object_store.name_of(item.url) for item in object_store.listed(join(run, "adapter"))}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    for step in steps_of(run):
        for disk in ("host-0", "host-1"):
            assert on_disk(tmp_path / "disks" / disk, step)


def test_the_best_step_is_the_one_it_went_on_from(s3: str, material: Path, tmp_path: Path) -> None:
    """Of which each host has fetched what its devices hold, and the store has the rest."""
    run = join(s3, "run")
    options = {
        "max_steps": 9, "eval_steps": 3, "save_steps": 3, "load_best_model_at_end": "true",
        "save_total_limit": 1, "fsdp": 4,
    }  # fmt: skip
    codes, said = ended(material, run, tmp_path / "a", kill=5, more=FIRST_IS_BEST, **options)
    assert codes == [75, -9], said
    codes, said = ended(material, run, tmp_path / "b", more=FIRST_IS_BEST, **options)
    assert codes == [0, 0], said
    assert "going on after step 3" in said[0]
    assert "best: step 3, eval_loss 3.0000; it is exported" in said[0]
    assert object_store.find(join(run, "hf", "config.json"))

    # Looked at by two hosts, on disks of their own: the store has one file more.
    before = {item.url: item.tag for item in object_store.listed(run)}
    codes, said = ended(material, run, tmp_path / "c", replay_step=8, **options)
    assert codes == [0, 0], said
    after = {item.url: item.tag for item in object_store.listed(run)}
    assert f"replayed step 8: {join(run, 'step-8.json')}" in said[0]
    assert after.pop(join(run, "step-8.json"))
    assert after == before


def test_the_chunks_that_a_host_needs(tmp_path: Path) -> None:
    """Of 8 x 6 in chunks of 2 x 6 the devices of this host hold rows 3 to 5; a scalar is one."""

    def leaf(shape: tuple[int, ...], *indices: tuple[slice, ...]) -> SimpleNamespace:
        held = dict(enumerate(indices))
        sharding = SimpleNamespace(addressable_devices_indices_map=lambda _: held)
        return SimpleNamespace(shape=shape, sharding=sharding)

    file = tmp_path / ".zarray"
    file.write_text('{"shape": [8, 6], "chunks": [2, 6], "dimension_separator": "."}')
    whole = slice(None)
    assert set(remote_shards._held(leaf((8, 6), (slice(3, 6), whole)), file)) == {"1.0", "2.0"}
    assert set(remote_shards._held(leaf((8, 6), (whole, slice(0, 1))), file)) == {
        "0.0", "1.0", "2.0", "3.0"
    }  # fmt: skip
    assert set(remote_shards._held(leaf((4, 6), (whole, whole)), file)) == set()
    file.write_text('{"shape": [], "chunks": []}')
    assert set(remote_shards._held(leaf((), ()), file)) == {"0"}
