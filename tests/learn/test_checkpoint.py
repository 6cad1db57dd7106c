"""Checkpoints: exact, resharded, partial, limited in number, and sure of which step they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.config import ConfigError
from jaxtune.learn import optim
from jaxtune.learn.checkpoint import Checkpoints, restore_trained
from jaxtune.learn.state import TrainState, abstract_state, init_opt_state, state_shardings
from jaxtune.mesh import make_mesh

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


def test_restored_onto_another_mesh_bit_for_bit(tmp_path: Path) -> None:
    state, _, _ = state_on("fsdp", 0.1)
    writing = Checkpoints(tmp_path)
    writing.save(state, META, step=4)
    writing.close()

    _, shapes, shardings = state_on("tensor", 7.0)
    reading = Checkpoints(tmp_path)
    assert reading.latest() == 4
    assert reading.meta(4)["fingerprint"] == "abc"
    restored, meta = reading.restore(4, shapes, shardings)
    reading.close()
    assert_bytes(state, restored)
    assert restored.trained["w"]["kernel"].sharding.spec == P("tensor", None)
    assert meta == {**META, "step": 4}


def test_the_trained_part_alone_of_any_step(tmp_path: Path) -> None:
    saved = {}
    checkpoints = Checkpoints(tmp_path)
    for step, value in ((1, 1.0), (2, 2.0)):
        saved[step], shapes, shardings = state_on("fsdp", value)
        checkpoints.save(saved[step], META, step=step)
    checkpoints.close()
    for step, expected in ((1, 1), (2, 2), (None, 2)):
        params, meta = restore_trained(tmp_path, shapes.trained, shardings.trained, step=step)
        assert meta["step"] == expected
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
    restored, _ = checkpoints.restore(1, shapes, shardings)
    assert_bytes(state[1:], restored[1:])
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
