"""A run that makes no progress: its stacks are shown, and it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from multihost.runs import free_port

from jaxtune.parallel.heartbeat import Beat, Heartbeat, StopSignal, ended_by_signals, stop_notices

HANGS = """
import sys, time
from pathlib import Path
from jaxtune.parallel.heartbeat import Heartbeat

def never_returns():
    time.sleep(60)

with Heartbeat(hang_seconds=0.4, folder=Path(sys.argv[1])) as watch:
    with watch.unlimited("exporting"):
        time.sleep(1)
    watch.at(7, "in the step")
    never_returns()
"""


def test_a_hang_shows_every_stack_and_ends_with_75(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path)],
        capture_output=True, text=True, timeout=30, check=False, env={**os.environ},
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    assert "no progress for 0.4 s at step 7, in the step" in done.stderr
    for text in (done.stderr, (tmp_path / "stacks-host-0.txt").read_text()):
        assert "in never_returns" in text


def test_who_lags_is_named() -> None:
    watch = Heartbeat(hang_seconds=1)
    watch.at(9, "in the step")
    here = dict.fromkeys(range(3), Beat(5, 9, "in the step", 99.0))
    watch.peers = {**here, 1: Beat(5, 8, "waiting for data", 99.0)}
    assert "Host 1 lags: it is at step 8, waiting for data; others are at step 9" in (
        watch._laggard()
    )
    watch.peers = {**here, 2: Beat(5, 9, "saving", 99.0)}
    assert "not all do the same (host 2: saving)" in watch._laggard()
    watch.peers = {**here, 2: Beat(3, 9, "in the step", 0.0)}
    assert watch.silent() == [2]
    assert "Host 2 is silent" in watch._laggard()
    watch.peers = {**here, 1: Beat(3, 9, "in the step", 9.0), 2: Beat(3, 9, "in the step", 0.0)}
    assert watch.silent() == [2]  # host 1 ended because of it


def test_a_process_that_nobody_joins_ends_with_75() -> None:
    """Where the first is there and the others are not, and where the first is not: JAX aborts
    there, and what it would have raised never comes."""
    for number in (0, 1):
        code = (
            "from jaxtune import cli\n"
            "from jaxtune.config import HostsConfig\n"
            "from jaxtune.parallel import heartbeat, processes\n"
            "processes._JOIN_SECONDS = 3\n"
            f"asked = HostsConfig(coordinator_address='127.0.0.1:{free_port()}', num_processes=2,"
            f" process_id={number})\n"
            "run = lambda config, options: heartbeat.join(asked)\n"
            "raise SystemExit(cli.execute('train', '', cli.Options, run, []))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 75, done.stderr
        assert "did not join within five minutes" in done.stderr or "could not join" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_where_nothing_is_to_be_saved(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(StopSignal, match=number.name), ended_by_signals():
        signal.raise_signal(number)
    assert signal.getsignal(number) is before
    with ended_by_signals(), stop_notices(lambda said: None) as asked:
        signal.raise_signal(number)
        assert asked() == number.name
    assert signal.getsignal(number) is before
