"""Callbacks of runs on two hosts: called on the first, obeyed by both."""

from __future__ import annotations

from pathlib import Path

import pytest
from multihost import runs

pytestmark = pytest.mark.xdist_group("multihost")  # one worker: the two cores are shared as it is

# Three calls of `train` in one process, each going on from what the one before it saved. In the
# last one SIGTERM comes, while steps are as slow as real ones: JAX looks for it once a second.
SCRIPT = """
import os, signal, time, traceback
import jaxtune as jt
from jaxtune import cli
from jaxtune.train import TrainOptions

class Raises(jt.Callback):
    def on_step(self, row):
        print("called at", row["step"], flush=True)
        if row["step"] == 2:
            raise ValueError("not what I wanted")

class Stops(jt.Callback):
    def on_step(self, row):
        return row["step"] >= 6 and jt.STOP

class Terminated(jt.Callback):
    def on_step(self, row):
        time.sleep(0.7)
        if row["step"] == 8:
            os.kill(os.getpid(), signal.SIGTERM)

config, _ = cli.parse(sys.argv[1:], "train", "", TrainOptions)
try:
    jt.train(config, callbacks=[Raises()])
except jt.CallbackError as error:
    traceback.print_exception(error)
    print(error, flush=True)
print("stopped at", jt.train(config, callbacks=[Stops()]).step, flush=True)
try:
    jt.train(config, callbacks=[Terminated()])
except cli.Stopped as stopped:
    print(stopped, flush=True)
sys.exit()
"""


def test_callbacks_on_two_hosts(material: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = {"save_steps": 100, "eval_steps": 100, "max_steps": 40, "export": "false",
            "save_total_limit": 3}  # fmt: skip
    hosts = runs.start(runs.flags(material, out, **more), hosts=2, devices=2, before=SCRIPT)
    assert [host.end() for host in hosts] == [0, 0], hosts[0].stderr + hosts[1].stderr
    first, second = (host.stdout.splitlines() for host in hosts)
    # The first host calls; what is raised there is an error of both, with its own traceback there.
    error = "error in callback Raises.on_step: ValueError: not what I wanted"
    assert first[:3] == ["called at 1", "called at 2", error]
    assert second[0] == f"on the first host: {error}"
    assert "in on_step\nValueError: not what I wanted\n" in hosts[0].stderr
    # Metrics are read one step late, so the step after the callback's is the last.
    assert first[3] == second[1] == "stopped at 7"
    assert first[4:] == second[2:]
    assert first[4].startswith("stopped by SIGTERM on one of the hosts after step ")
    saved = sorted(int(path.name) for path in (out / "checkpoints").iterdir())
    assert saved[:2] == [3, 7]
    assert f"after step {saved[2]}, which is saved in " in first[4]
    assert [row["step"] for row in runs.rows_of(out)] == list(range(1, saved[2] + 1))
