"""One run at a time in a folder: refused while another lives, never after it has ended."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxtune.config import ConfigError
from jaxtune.storage import lock

# Holds the lock of a folder until it is killed, and has a child of the given kind, which stays.
ANOTHER = """
import os, subprocess, sys, time
from pathlib import Path
from jaxtune.storage import lock
with lock.held(Path(sys.argv[1]), print):
    child = 0
    if sys.argv[2] == "forked" and not (child := os.fork()):
        os.close(1)
        time.sleep(60)
        os._exit(0)
    if sys.argv[2] == "started":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid
    print(child, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_ENDING_SECONDS", 0.3)
    monkeypatch.setattr(lock, "_ELSEWHERE_SECONDS", 0.6)
    monkeypatch.setattr(lock, "_LOOK_SECONDS", 0.05)


@pytest.fixture(params=["none", "forked", "started"])
def another(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of `tmp_path`."""
    words = [sys.executable, "-c", ANOTHER, str(tmp_path), request.param]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, **pipes)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    assert (child > 0) is (request.param != "none")
    yield process
    process.kill()
    process.wait()
    if child:
        os.kill(child, 9)


def test_a_live_one_is_named_and_a_killed_one_is_not_waited_for(
    another: subprocess.Popen[str], tmp_path: Path
) -> None:
    notes: list[str] = []
    who = f"process {another.pid} on {platform.node()} is writing there"
    refused = pytest.raises(ConfigError, match=f"output_dir {tmp_path}: {who}")
    with refused as error, lock.held(tmp_path, notes.append):
        pass
    assert str(tmp_path / lock.NAME) in str(error.value)
    assert "choose another output_dir" in str(error.value)
    assert notes == [f"output_dir {tmp_path}: {who}; waiting 0.3 s for its end"]
    another.kill()
    with lock.held(tmp_path, notes.append):  # at once: it may still be ending
        assert len(notes) <= 2


def test_one_that_ends_meanwhile_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_ENDING_SECONDS", 30.0)
    words = [sys.executable, "-c", ANOTHER, str(tmp_path), "none"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, **pipes) as process:
        assert process.stdout is not None
        process.stdout.readline()

        def end(note: str) -> None:
            assert process.stdin is not None
            process.stdin.close()

        began = time.monotonic()
        with lock.held(tmp_path, end):
            assert time.monotonic() - began < 30


def test_in_one_process_one_after_the_other(tmp_path: Path) -> None:
    for _ in range(2):
        refused = pytest.raises(ConfigError, match=f"process {os.getpid()} on")
        with lock.held(tmp_path, print), refused, lock.held(tmp_path, print):
            pass


def test_of_another_machine_it_is_waited_for_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(platform, "node", lambda: "far")
        first = lock.held(tmp_path, print)
        first.__enter__()
    refused = pytest.raises(ConfigError, match="on far is writing there")
    with refused, lock.held(tmp_path, notes.append):
        pass
    assert "waiting 0.6 s" in notes[0]
    first.__exit__(None, None, None)


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL])
def test_without_locks_nobody_is_refused(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(file: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    with lock.held(tmp_path, print), lock.held(tmp_path, print):
        pass
