"""worker.sh as on a TPU VM: installing, a run that outlives its ssh, exit codes, stopping."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from fake_cloud import SCRIPTS

# Stands in for .venv/bin/python: shows arguments and environment, then does what FATE says.
PYTHON = """#!/bin/bash
echo "args: $*"
echo "token: ${HF_TOKEN:-none} in $PWD"
trap 'echo saved; exit 75' TERM
if [[ $* == *"--wait"* ]]; then for _ in {1..200}; do sleep 0.05; done; fi
exit "${!#}"
"""


class Worker:
    def __init__(self, home: Path) -> None:
        self.home = home
        shutil.copy(SCRIPTS / "worker.sh", home / "jaxtune-worker.sh")

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "jaxtune-worker.sh", *words],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            cwd=self.home,
            env={"HOME": str(self.home), "PATH": os.environ["PATH"], **environment},
        )

    def state(self) -> str:
        return self.run("status", "train").stdout.split(maxsplit=2)[2].strip()

    def wait(self, state: str) -> None:
        until = time.monotonic() + 10
        while (found := self.state()) != state:
            assert time.monotonic() < until, f"{found} instead of {state}: {self.log()}"
            time.sleep(0.02)

    def log(self) -> str:
        return self.run("log", "train", "100").stdout


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    python = tmp_path / "jaxtune" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    return Worker(tmp_path)


def test_a_run_writes_down_how_it_ended(worker: Worker) -> None:
    assert worker.state() == "absent"
    (worker.home / ".jaxtune").mkdir()
    (worker.home / ".jaxtune" / "secrets.env").write_text("HF_TOKEN=hf_verysecret\n")
    done = worker.run("start", "train", "--config", "a b.yaml", "3")
    assert done.returncode == 0, done.stderr
    worker.wait("exit 3")
    assert worker.log().splitlines() == [
        "args: -m jaxtune.train --config a b.yaml 3",
        f"token: hf_verysecret in {worker.home}/jaxtune",
    ]
    worker.run("start", "train", "0")  # the same again: its log goes on, its exit code is its own
    worker.wait("exit 0")
    assert worker.log().count("args:") == 2


def test_stop_lets_it_save(worker: Worker) -> None:
    worker.run("start", "train", "--wait", "0")
    worker.wait("running")
    refused = worker.run("start", "train", "0")
    assert refused.returncode == 2
    assert "is running already" in refused.stderr
    while "args:" not in worker.log():
        time.sleep(0.02)
    assert worker.run("stop", "train").returncode == 0
    worker.wait("exit 75")
    assert "saved" in worker.log()
    assert worker.run("stop", "train").returncode == 0  # nothing to stop any more


def test_a_run_that_vanished_is_lost(worker: Worker) -> None:
    worker.run("start", "train", "--wait", "0")
    worker.wait("running")
    pid = int((worker.home / ".jaxtune" / "runs" / "train" / "pid").read_text())
    assert os.getsid(pid) == pid  # a session of its own: no hangup reaches it
    os.killpg(pid, 9)
    worker.wait("lost")


def test_setup_installs_and_hides_what_is_secret(worker: Worker, tmp_path: Path) -> None:
    shutil.rmtree(worker.home / "jaxtune")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "uv").write_text(
        "#!/bin/bash\n"
        'echo "uv $*" >>"$HOME/uv-calls"\n'
        'if [[ $1 == venv ]]; then mkdir -p .venv/bin; printf "#!/bin/bash\\necho versions\\n" '
        ">.venv/bin/python; chmod +x .venv/bin/python; fi\n"
    )
    (tools / "uv").chmod(0o755)
    (worker.home / "jaxtune-secrets.env").write_text("HF_TOKEN=x\n")
    source = tmp_path / "source"
    source.mkdir()
    (source / "pyproject.toml").write_text("[project]\n")
    archive = str(worker.home / "jaxtune-source.tar.gz")
    subprocess.run(["tar", "-czf", archive, "-C", source, "."], check=True)
    path = f"{tools}:{os.environ['PATH']}"
    for _ in range(2):  # the second time finds the environment there
        done = worker.run("setup", ".[tpu]", PATH=path)
        assert done.returncode == 0, done.stderr
        assert "versions" in done.stdout
    calls = (worker.home / "uv-calls").read_text().splitlines()
    install = "uv pip install --quiet --python .venv/bin/python .[tpu]"
    assert calls == ["uv venv --quiet --python 3.12 .venv", install, install]
    secrets = worker.home / ".jaxtune" / "secrets.env"
    assert secrets.stat().st_mode & 0o777 == 0o600
    assert secrets.parent.stat().st_mode & 0o777 == 0o700
    assert not (worker.home / "jaxtune-secrets.env").exists()
    assert (worker.home / "jaxtune" / "pyproject.toml").exists()


def test_what_it_cannot_do_it_says(worker: Worker) -> None:
    done = worker.run("bogus")
    assert done.returncode == 2
    assert "jaxtune-worker.sh start RUN" in done.stdout
