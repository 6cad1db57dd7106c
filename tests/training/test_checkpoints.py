"""Checkpoints: exact, resharded, partial, limited in number, and sure of which step they are."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.config import ConfigError
from jaxtune.parallel import processes
from jaxtune.parallel.mesh import make_mesh
from jaxtune.training.checkpoint import checkpoints as checkpoint
from jaxtune.training.checkpoint import integrity
from jaxtune.training.checkpoint.checkpoints import Checkpoints, read_meta, restore_trained
from jaxtune.training.optim import optim
from jaxtune.training.state import TrainState, abstract_state, init_opt_state, state_shardings

META = {"fingerprint": "abc", "total_steps": 9}
OPTIMISER = optim.optimiser(optim.Hyper(), {"w": {"kernel": ("embed", None)}})


def state_on(axis: str, value: float) -> tuple[TrainState, TrainState, TrainState]:
    """(state, its shapes, its shardings), `w` spread over one mesh axis."""
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1, axis: 8}
    mesh = make_mesh(sizes)
    params = {"w": {"kernel": jnp.arange(32.0).reshape(16, 2) * value}}
    where = {"w": {"kernel": NamedSharding(mesh, P(axis, None))}}
    shapes = abstract_state(jax.eval_shape(lambda: params), OPTIMISER)
    shardings = state_shardings(shapes, where, mesh)
    opt_state = init_opt_state(OPTIMISER, params)
    opt_state = (opt_state[0]._replace(mu=jax.tree.map(lambda p: p / 3, params)), *opt_state[1:])
    step = jnp.asarray(4, jnp.int32)
    return jax.device_put(TrainState(step, params, opt_state), shardings), shapes, shardings


def assert_bytes(a: object, b: object) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("axis", ["tensor", "expert"])
def test_restored_onto_another_mesh_bit_for_bit(tmp_path: Path, axis: str) -> None:
    state, _, _ = state_on("fsdp", 0.1)
    writing = Checkpoints(tmp_path)
    writing.save(state, META, step=4)
    writing.close()

    _, shapes, shardings = state_on(axis, 7.0)
    reading = Checkpoints(tmp_path)
    assert reading.latest() == 4
    assert reading.meta(4)["fingerprint"] == "abc"
    restored, meta = reading.restore(4, shapes, shardings), reading.meta(4)
    reading.close()
    assert_bytes(state, restored)
    assert restored.trained["w"]["kernel"].sharding.spec == P(axis, None)
    assert meta == {**META, "step": 4}


def test_the_trained_part_alone_of_any_step(tmp_path: Path) -> None:
    saved = {}
    checkpoints = Checkpoints(tmp_path)
    for step, value in ((1, 1.0), (2, 2.0)):
        saved[step], shapes, shardings = state_on("fsdp", value)
        checkpoints.save(saved[step], META, step=step)
    checkpoints.close()
    for step, expected in ((1, 1), (2, 2), (None, 2)):
        params = restore_trained(tmp_path, shapes.trained, shardings.trained, step=step)
        assert read_meta(tmp_path, step)["step"] == expected
        assert_bytes(params, saved[expected].trained)
    with pytest.raises(ConfigError, match=r"no checkpoint of step 7; there are: 1, 2"):
        restore_trained(tmp_path, shapes.trained, shardings.trained, step=7)
    with pytest.raises(ConfigError, match="no checkpoints; expected"):
        restore_trained(tmp_path / "none", shapes.trained, shardings.trained)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    state, _, _ = state_on("fsdp", 1.0)
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(state, META, step=step)
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_what_a_killed_save_left_is_not_a_checkpoint(tmp_path: Path) -> None:
    state, _, _ = state_on("fsdp", 1.0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, META, step=1)
    checkpoints.close()
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
    again = Checkpoints(tmp_path)
    assert again.latest() == 1
    again.save(state, META, step=2)
    again.close()
    assert Checkpoints(tmp_path).latest() == 2


def test_a_full_disk_is_said_before_writing_and_the_last_step_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, shapes, shardings = state_on("fsdp", 1.0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, META, step=1)
    checkpoints.wait()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(ConfigError) as error:
        checkpoints.save(state, META, step=2)
    assert "step 2 needs 0.0 MB and the disk has 0.0 MB free" in str(error.value)
    assert "it goes on from step 1, which is intact" in str(error.value)
    monkeypatch.undo()
    restored = checkpoints.restore(1, shapes, shardings)
    assert_bytes(state[1:], restored[1:])
    checkpoints.close()


def test_a_disk_that_hosts_share_takes_the_parts_of_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, _, _ = state_on("fsdp", 1.0)
    checkpoints = Checkpoints(tmp_path)
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4 * needed))
    checkpoints._check_space(state, 1)
    monkeypatch.setattr(processes, "gather_texts", lambda text: [text] * 8)
    with pytest.raises(ConfigError, match=r"step 1 needs .* MB and the disk has"):
        checkpoints._check_space(state, 1)
    checkpoints.close()


def test_a_write_that_fails_is_explained(tmp_path: Path) -> None:
    state, _, _ = state_on("fsdp", 1.0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, META, step=1)
    checkpoints.wait()

    def no_json() -> None:
        checkpoints.save(state, {"total_steps": object()}, step=2)
        checkpoints.wait()

    with pytest.raises(ConfigError, match="could not be written") as error:
        no_json()
    assert "it goes on from step 1, which is intact" in str(error.value)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flip": (flip, "its bytes are not those that were written"),
    "truncate": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
    "delete": (Path.unlink, "No such file"),
    "digests": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_step_is_named_and_the_one_before_it_taken(kind: str, tmp_path: Path) -> None:
    state, shapes, shardings = state_on("fsdp", 1.0)
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(state, META, step=step)
    checkpoints.close()
    folder = tmp_path / "checkpoints"
    digest = kind == "digests"
    files = [path for path in (folder / "2").rglob("*") if path.is_file()]
    struck = max(files, key=lambda p: (p.name.startswith("digests") is digest, p.stat().st_size))
    strike, said = DAMAGE[kind]
    strike(struck)
    name = struck.relative_to(folder / "2").as_posix()

    with pytest.raises(ConfigError, match="is damaged") as error:
        restore_trained(tmp_path, shapes.trained, shardings.trained, step=2)
    assert name in str(error.value)
    assert "there are: 1" in str(error.value)
    assert read_meta(tmp_path)["step"] == 1
    older = restore_trained(tmp_path, shapes.trained, shardings.trained)
    assert_bytes(older, restore_trained(tmp_path, shapes.trained, shardings.trained, step=1))

    notes: list[str] = []
    again = Checkpoints(tmp_path)
    assert again.newest_good(notes.append) == 1
    assert len(notes) == 1
    assert name in notes[0]
    assert said in notes[0]
    assert sorted(path.name for path in folder.iterdir()) == ["1", "damaged-2"]
    again.save(state, META, step=2)  # the run comes here again
    again.close()
    assert Checkpoints(tmp_path).newest_good(notes.append) == 2
    assert len(notes) == 1


def of_steps(run_dir: Path, *steps: int) -> Path:
    """The folder of checkpoints of a run that has ended."""
    state, _, _ = state_on("fsdp", 1.0)
    checkpoints = Checkpoints(run_dir)
    for step in steps:
        checkpoints.save(state, META, step=step)
    checkpoints.close()
    return run_dir / "checkpoints"


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("steps", [(2,), (2, 4)])
def test_where_all_are_damaged_nothing_begins_anew(steps: tuple[int, ...], tmp_path: Path) -> None:
    folder = of_steps(tmp_path, *steps)
    for step in steps:
        flip(folder / str(step) / "meta" / "metadata")
    before = contents(folder)
    said = (
        "the only checkpoint, step 2, is" if len(steps) == 1 else r"all 2 checkpoints \(2, 4\) are"
    )
    for _ in range(2):  # nor with the same command again
        again = Checkpoints(tmp_path)
        with pytest.raises(ConfigError, match=rf"{said} damaged \(meta/metadata: its bytes"):
            again.newest_good(print)
        again.close()
        assert contents(folder) == before
    for step in steps:
        shutil.rmtree(folder / str(step))
    again = Checkpoints(tmp_path)
    assert again.newest_good(print) is None
    again.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
@pytest.mark.parametrize("at", ["open", "read", "digests"])
def test_what_cannot_be_read_is_not_damaged(
    number: int, at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = of_steps(tmp_path, 2, 4)
    before = contents(folder)
    owner, name = {"open": (Path, "open"), "read": (hashlib, "file_digest"),
                   "digests": (Path, "read_text")}[at]  # fmt: skip
    was = getattr(owner, name)

    def refused(first: Any, *args: Any, **more: Any) -> Any:
        path = str(getattr(first, "name", first)) if at == "read" else str(first)
        if f"{folder}/4/" in path:
            raise OSError(number, os.strerror(number))
        return was(first, *args, **more)

    monkeypatch.setattr(owner, name, refused)
    reading = Checkpoints(tmp_path)
    with pytest.raises(ConfigError, match=f"cannot be read: {os.strerror(number)}") as error:
        reading.newest_good(print)
    assert f"{folder}/4" in str(error.value)
    with pytest.raises(ConfigError, match="so nothing is changed"):
        restore_trained(tmp_path, None, None, step=4)
    reading.close()
    monkeypatch.undo()
    assert contents(folder) == before
    again = Checkpoints(tmp_path)
    assert again.newest_good(print) == 4
    again.close()


def test_one_host_that_cannot_read_stops_all(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"failed": ["", "/run/4/d/0: cannot be read: Input/output error."], "found": ["", "x"]}
    told = iter(said.values())
    monkeypatch.setattr(processes, "gather_texts", lambda text: next(told))
    with pytest.raises(ConfigError, match="/run/4/d/0: cannot be read"):
        checkpoint._of_all(lambda: "")


def test_one_who_reads_changes_nothing_of_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = of_steps(tmp_path, 1, 2)
    flip(folder / "2" / "meta" / "metadata")
    state, _, _ = state_on("fsdp", 1.0)
    going = Checkpoints(tmp_path)
    seal, may = integrity.write, threading.Event()

    def slow(*args: Any, **more: Any) -> None:
        may.wait(60)
        seal(*args, **more)

    monkeypatch.setattr(integrity, "write", slow)
    going.save(state, META, step=3)
    going._checkpointer.wait_until_finished()
    (folder / "4.orbax-checkpoint-tmp").mkdir()
    before = contents(folder)
    notes: list[str] = []
    reading = Checkpoints(tmp_path, reading=True)
    assert reading.newest_good(notes.append, before=3) == 1
    reading.close()
    assert contents(folder) == before
    assert (folder / "4.orbax-checkpoint-tmp").exists()
    assert ["2: is damaged and not used" in note for note in notes] == [True]
    assert "damaged-2" not in notes[0]
    may.set()
    going.close()
    assert Checkpoints(tmp_path).latest() == 3
    nothing = Checkpoints(tmp_path / "none", reading=True)
    assert nothing.newest_good(print, before=3) is None
    nothing.close()
    assert not (tmp_path / "none").exists()


def test_the_best_step_is_kept_besides_the_newest(tmp_path: Path) -> None:
    state, _, _ = state_on("fsdp", 1.0)
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2, 3, 4):
        checkpoints.save(state, META, step=step, best=2)
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]


def test_a_step_without_its_digests_does_not_count(tmp_path: Path) -> None:
    """Killed between the last byte and the digests: nothing says that the bytes are right."""
    state, _, _ = state_on("fsdp", 1.0)
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(state, META, step=step)
    checkpoints.close()
    folder = tmp_path / "checkpoints"
    (folder / "2" / "digests-0.json").unlink()
    with pytest.raises(ConfigError, match="no checkpoint of step 2; there are: 1"):
        restore_trained(tmp_path, None, None, step=2)
    again = Checkpoints(tmp_path)
    assert again.newest_good(lambda text: None) == 1
    assert not (folder / "2").exists()


def test_of_several_hosts_all_must_have_written_their_digests(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode() * 9)
    integrity.write(tmp_path, host=0, hosts=2)
    assert "never finished" in integrity.verify(tmp_path)
    integrity.write(tmp_path, host=1, hosts=2)
    assert integrity.verify(tmp_path) == ""
    flip(tmp_path / "b")
    # Read by three: only the one whose share it is looks at the bytes.
    said = [integrity.verify(tmp_path, host=host, hosts=3) for host in range(3)]
    assert [text.partition(":")[0] for text in said] == ["", "b", ""]
    (tmp_path / "d").write_bytes(b"d")
    assert integrity.verify(tmp_path) == "d: is not one of its files"


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sealed")
    (folder / "a").write_bytes(b"abc" * 50)
    integrity.write(folder)
    return folder


@settings(max_examples=1000, deadline=None)
@given(at=st.integers(0, 10_000), mask=st.integers(1, 255), cut=st.booleans())
def test_no_digests_are_too_broken_to_be_refused(
    sealed: Path, at: int, mask: int, cut: bool
) -> None:
    """One byte of them changed, or all after it gone: an answer, never a traceback."""
    path = sealed / "digests-0.json"
    whole = path.read_bytes()
    at %= len(whole)
    try:
        path.write_bytes(
            whole[:at] if cut else whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :]
        )
        said, counts = integrity.verify(sealed), integrity.complete(sealed)
    finally:
        path.write_bytes(whole)
    assert isinstance(said, str)
    assert counts or "never finished" in said
    assert said or not (cut or chr(whole[at]).isalnum())
    assert integrity.verify(sealed) == ""


@pytest.mark.parametrize("meta", [{"step": {}}, {"fingerprint": 3}, {"standing": []}])
def test_a_meta_of_another_kind_is_refused(tmp_path: Path, meta: dict) -> None:
    """Sealed again, so that the digests say that all is well."""
    state, _, _ = state_on("fsdp", 1.0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, META, step=4)
    checkpoints.close()
    place = tmp_path / "checkpoints" / "4"
    file = place / "meta" / "metadata"
    file.write_text(json.dumps({**json.loads(file.read_text()), **meta}))
    integrity.write(place)
    with pytest.raises(ConfigError, match="its meta is not what was written"):
        read_meta(tmp_path)


def test_what_orbax_cannot_read_is_refused(tmp_path: Path) -> None:
    state, shapes, shardings = state_on("fsdp", 1.0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, META, step=4)
    checkpoints.close()
    place = tmp_path / "checkpoints" / "4"
    for path in (place / "trained").rglob("*"):
        if path.is_file():
            path.write_bytes(b"{")
    integrity.write(place)
    with pytest.raises(ConfigError, match="is whole, but cannot be read as a checkpoint"):
        restore_trained(tmp_path, shapes.trained, shardings.trained)
