"""A run directory in a store: what counts there, whenever the copying is killed or refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxtune.config import ConfigError
from jaxtune.storage import lock, object_store
from jaxtune.storage.object_store import StoreError, join
from jaxtune.training.checkpoint import integrity, remote
from jaxtune.training.checkpoint.checkpoints import Checkpoints
from jaxtune.training.checkpoint.remote import RemoteSync, fetch_run, steps_of


def make_step(folder: Path, step: int) -> None:
    """A checkpoint of three files and its digests."""
    place = folder / "checkpoints" / str(step)
    for name in ("meta", "opt/d/0", "trained/d/0"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(f"{step} {name}".encode() * 50)
    integrity.write(place)


def make_rows(folder: Path, last: int) -> None:
    rows = (json.dumps({"kind": "train", "step": step, "loss": 1.0}) for step in range(1, last + 1))
    (folder / "metrics.jsonl").write_text("".join(row + "\n" for row in rows))


def opened(url: str, folder: Path, said: list[str]) -> RemoteSync:
    folder.mkdir(parents=True, exist_ok=True)
    made = RemoteSync(url, folder, said.append)
    made.claim()
    return made


@pytest.fixture
def run(place: str, tmp_path: Path) -> Any:
    """(sync, folder, what it said) of a run with step 4 in the store."""
    said: list[str] = []
    folder = tmp_path / "run"
    made = opened(place, folder, said)
    (folder / "config.yaml").write_text("seed: 1\n")
    make_rows(folder, 4)
    make_step(folder, 4)
    made.put_step(4)
    yield made, folder, said
    made.close()


def test_a_run_goes_on_from_the_store_on_an_empty_disk(run: Any, tmp_path: Path) -> None:
    made, folder, _ = run
    other = opened(made.url, tmp_path / "elsewhere", [])
    assert other.steps == {4}
    assert (tmp_path / "elsewhere" / "metrics.jsonl").read_bytes() == (
        folder / "metrics.jsonl"
    ).read_bytes()
    other.fetch_step(4, tmp_path / "elsewhere" / "checkpoints" / "4")
    assert integrity.verify(tmp_path / "elsewhere" / "checkpoints" / "4") == ""
    other.close()


def test_what_grows_is_put_by_whole_lines(run: Any) -> None:
    made, folder, _ = run
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 5}\n{"kind": "tr')
    made.close()
    rows = object_store.read(join(made.url, "metrics.jsonl")).splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4, 5]


def test_it_is_put_while_the_run_goes_on(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    monkeypatch.setattr(remote, "SECONDS", 0.05)
    made = opened(memory, tmp_path / "run", [])
    make_rows(tmp_path / "run", 3)
    deadline = time.monotonic() + 10
    while not object_store.find(join(memory, "metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert object_store.find(join(memory, "metrics.jsonl"))
    made.close()


def test_the_rows_of_a_step_are_there_before_it_counts(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = opened(memory, tmp_path / "run", [])
    order: list[str] = []
    for name in ("put", "put_bytes"):
        was = getattr(object_store, name)

        def noted(what: Any, url: str, was: Any = was) -> None:
            order.append(url.removeprefix(f"{memory}/"))
            was(what, url)

        monkeypatch.setattr(object_store, name, noted)
    make_rows(tmp_path / "run", 4)
    make_step(tmp_path / "run", 4)
    made.put_step(4)
    assert order[0] == "metrics.jsonl"
    assert order[-1] == "checkpoints/4/digests-0.json"
    assert len(order) == 5
    made.close()


def test_a_step_is_removed_by_its_mark_first(run: Any) -> None:
    made, folder, _ = run
    make_step(folder, 8)
    made.put_step(8)
    made.remove_step(4)
    assert steps_of(made.url) == [8]
    assert object_store.listed(join(made.url, "checkpoints", 4)) == []


# -- a folder here that is not this run's ----------------------------------------------------------


def test_a_run_that_was_removed_from_the_store_does_not_come_back(run: Any, tmp_path: Path) -> None:
    made, folder, _ = run
    made.close()
    object_store.remove(item.url for item in object_store.listed(made.url))
    with lock.held(folder, print):
        again = opened(made.url, folder, [])
        assert (folder / lock.NAME).exists()  # else another run would make one of its own
    assert again.steps == set()
    assert not (folder / "checkpoints").exists()
    assert not (folder / "metrics.jsonl").exists()
    again.close()


def test_what_is_newer_here_stays(run: Any) -> None:
    made, folder, _ = run
    made.close()
    make_step(folder, 8)
    make_rows(folder, 8)
    again = opened(made.url, folder, [])
    assert (folder / "metrics.jsonl").read_text().count("\n") == 8
    again.finish()
    assert steps_of(made.url) == [4, 8]
    again.close()


def test_what_is_newer_in_the_store_is_taken(run: Any, tmp_path: Path) -> None:
    made, folder, _ = run
    other = opened(made.url, tmp_path / "other", [])
    make_step(tmp_path / "other", 8)
    make_rows(tmp_path / "other", 8)
    other.put_step(8)
    other.close()
    made.close()
    make_rows(folder, 5)
    again = opened(made.url, folder, [])
    assert again.steps == {4, 8}
    assert (folder / "metrics.jsonl").read_text().count("\n") == 8
    again.close()


def test_objects_that_are_no_export_are_not_replaced(place: str, tmp_path: Path) -> None:
    object_store.put_bytes(b"photo", join(place, "hf", "holiday.jpg"))
    with pytest.raises(ConfigError, match=r"hf: holds objects that are no export \(no config"):
        opened(place, tmp_path / "run", [])
    assert [item.url for item in object_store.listed(place)] == [join(place, "hf/holiday.jpg")]


# -- killed at every object ------------------------------------------------------------------------

KILLED = """
import os, sys, threading
from pathlib import Path
from jaxtune.storage import object_store
from jaxtune.training.checkpoint.remote import RemoteSync, put_marked
url, folder, what, left = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
lock = threading.Lock()
def counted(name):
    was = getattr(object_store, name)
    def put(*args):
        global left
        with lock:
            if left == 0:
                os.kill(os.getpid(), 9)
            left -= 1
        return was(*args)
    setattr(object_store, name, put)
for name in ("put", "put_bytes"):
    counted(name)
was = object_store.remove
def remove(urls):
    for each in list(urls):
        global left
        if left == 0:
            os.kill(os.getpid(), 9)
        left -= 1
        was([each])
object_store.remove = remove
if what == "hf":
    put_marked(folder / "hf", url + "/hf", "config.json", contents=True)
else:
    made = RemoteSync(url, folder, print)
    made.put_step(8)
"""


def killed_at(url: str, folder: Path, what: str, at: int) -> bool:
    """Whether a process that copies was killed at its object `at`, or ended before."""
    words = [sys.executable, "-c", KILLED, url, str(folder), what, str(at)]
    code = subprocess.run(words, check=False, timeout=300).returncode
    assert code in (0, -9)
    return code == -9


@pytest.mark.slow
def test_a_checkpoint_killed_at_every_object(s3: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    made = opened(s3, folder, [])
    make_rows(folder, 8)
    make_step(folder, 4)
    made.put_step(4)
    made.close()
    make_step(folder, 8)
    at = 0
    while killed_at(s3, folder, "step", at):
        assert steps_of(s3) == [4]
        read = fetch_run_without_config(s3)
        assert integrity.verify(read / "checkpoints" / "4") == ""
        at += 1
    assert at >= 5  # metrics, three files, the mark
    assert steps_of(s3) == [4, 8]
    back = tmp_path / "back" / "8"
    back.parent.mkdir()
    remote.fetch_step(s3, 8, back)
    assert integrity.verify(back) == ""


def fetch_run_without_config(url: str) -> Path:
    object_store.put_bytes(b"seed: 1\n", join(url, "config.yaml"))
    return fetch_run(url)


def test_an_export_killed_at_every_object_never_loads_by_halves(s3: str, tmp_path: Path) -> None:
    hf = tmp_path / "run" / "hf"
    hf.mkdir(parents=True)
    old = {"config.json": b"old", "model-1.safetensors": b"1", "model-2.safetensors": b"2"}
    new = {"config.json": b"new", "model-1.safetensors": b"new one", "tokenizer.json": b"{}"}
    for name, data in new.items():
        (hf / name).write_bytes(data)
    at = 0
    while True:
        for name, data in old.items():
            object_store.put_bytes(data, join(s3, "hf", name))
        if not killed_at(s3, tmp_path / "run", "hf", at):
            break
        there = {
            object_store.name_of(i.url): object_store.read(i.url)
            for i in object_store.listed(join(s3, "hf"))
        }
        assert "config.json" not in there or there == (old if at == 0 else new), at
        at += 1
    assert at >= 5
    there = {
        object_store.name_of(i.url): object_store.read(i.url)
        for i in object_store.listed(join(s3, "hf"))
    }
    assert there == new


# -- refused ---------------------------------------------------------------------------------------


def test_a_store_that_cannot_be_begun_with_ends_the_run(s3: str, wire: Any, tmp_path: Path) -> None:
    wire["s3"].fault = lambda method, path: 403 if method == "PUT" else None
    with pytest.raises(StoreError, match=r"\.run-id: cannot be written: .* credentials"):
        opened(s3, tmp_path / "run", [])


def test_a_store_that_is_gone_is_said_once_and_made_good_later(
    s3: str, wire: Any, tmp_path: Path
) -> None:
    said: list[str] = []
    folder = tmp_path / "run"
    made = opened(s3, folder, said)
    make_rows(folder, 4)
    make_step(folder, 4)
    made.put_step(4)
    wire["s3"].fault = lambda method, path: 503
    for step in (8, 12):
        make_step(folder, step)
        with pytest.raises(StoreError) as caught:
            made.put_step(step)
        made.failed(f"step {step}", caught.value)
    assert len(said) == 1
    assert "step 8 is not there" in said[0]
    assert "The run goes on" in said[0]
    assert made.steps == {4}
    wire["s3"].fault = lambda method, path: None
    assert steps_of(s3) == [4]
    made.finish()
    assert steps_of(s3) == [4, 8, 12]
    made.close()


def test_bytes_that_came_out_otherwise_are_noticed(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hf").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "hf" / name).write_bytes(name.encode())
    was = object_store.put

    def damaged(file: Path, url: str) -> None:
        if file.name == "model.safetensors":
            object_store.put_bytes(file.read_bytes().upper(), url)
        else:
            was(file, url)

    monkeypatch.setattr(object_store, "put", damaged)
    with pytest.raises(StoreError, match=r"model\.safetensors: its bytes are not those .* right"):
        remote.put_export(tmp_path / "hf", join(s3, "hf"))
    assert not object_store.find(join(s3, "hf/config.json"))


# -- read ------------------------------------------------------------------------------------------


def listing(url: str) -> dict[str, str]:
    return {item.url: item.tag for item in object_store.listed(url)}


def test_one_who_only_looks_changes_nothing_of_a_run_that_goes_on(run: Any) -> None:
    made, _, _ = run
    object_store.put_bytes(b"half", join(made.url, "checkpoints/8/trained/d/0"))
    before = listing(made.url)
    here = remote.reading(made.url)
    assert here != remote.staging(made.url)
    here.mkdir(parents=True)
    looking = RemoteSync(made.url, here, print)
    looking.look()
    checkpoints = Checkpoints(here, sync=looking, reading=True)
    assert checkpoints.newest_good(print, before=9) == 4
    assert integrity.verify(here / "checkpoints" / "4") == ""
    (here / "metrics.jsonl").write_text("old\n")
    checkpoints.close()
    looking.close()
    assert listing(made.url) == before
    (here / "step-9.json").write_text("{}")
    looking.put("step-9.json")
    assert object_store.read(join(made.url, "step-9.json")) == b"{}"


def test_where_the_only_step_is_damaged_nothing_begins_anew(run: Any) -> None:
    made, folder, _ = run
    made.close()
    object_store.put_bytes(b"other", join(made.url, "checkpoints/4/meta"))
    (folder / "checkpoints/4/meta").write_bytes(b"gone too")
    for _ in range(2):
        again = opened(made.url, folder, [])
        before = listing(join(made.url, "checkpoints"))
        checkpoints = Checkpoints(folder, sync=again)
        with pytest.raises(ConfigError, match="the only checkpoint, step 4, is damaged") as error:
            checkpoints.newest_good(print)
        assert join(made.url, "checkpoints") in str(error.value)
        checkpoints.close()
        again.close()
        assert listing(join(made.url, "checkpoints")) == before
    assert (folder / "checkpoints/damaged-4/meta").read_bytes() == b"gone too"


def test_a_damaged_step_is_passed_over(run: Any) -> None:
    made, folder, _ = run
    make_step(folder, 8)
    made.put_step(8)
    object_store.put_bytes(b"other", join(made.url, "checkpoints/8/meta"))
    read = fetch_run(made.url)
    assert integrity.verify(read / "checkpoints" / "8") != ""
    assert integrity.verify(read / "checkpoints" / "4") == ""


def test_what_is_read_again_is_fetched_once(s3: str, wire: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    made = opened(s3, folder, [])
    (folder / "config.yaml").write_text("seed: 1\n")
    make_step(folder, 4)
    made.put_step(4)
    fetch_run(s3, step=4)
    asked = len(wire["s3"].asked)
    fetch_run(s3, step=4)
    got = [path for method, path in wire["s3"].asked[asked:] if method == "GET"]
    assert not [path for path in got if "opt/d/0" in path.split("?")[0]]
    made.close()


@pytest.mark.parametrize(
    ("step", "text"),
    [(5, "no checkpoint of step 5; there are: 4"), (None, "no run there: expected .*config.yaml")],
)
def test_runs_that_are_not_there(run: Any, step: int | None, text: str) -> None:
    made, _, _ = run
    with pytest.raises(StoreError, match=text):
        fetch_run(made.url if step else join(made.url, "none"), step=step)
