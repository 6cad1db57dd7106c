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
if [[ $1 == -c ]]; then exit 0; fi
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

    def begun(self) -> None:
        """It runs, and has got to where SIGTERM lets it save."""
        until = time.monotonic() + 10
        while "args:" not in self.log():
            assert time.monotonic() < until, self.state()
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
    worker.begun()
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


def send(worker: Worker, folder: Path, *names: str) -> None:
    """A checkout of such files, as setup.sh sends it."""
    source = folder / "checkout"
    shutil.rmtree(source, ignore_errors=True)
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("[project]\n")
    archive = str(worker.home / "jaxtune-source.tar.gz")
    subprocess.run(["tar", "-czf", archive, "-C", source, "."], check=True)


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
    send(worker, tmp_path, "pyproject.toml")
    path = f"{tools}:{os.environ['PATH']}"
    for _ in range(2):  # the second time finds the environment there
        done = worker.run("setup", ".[tpu]", PATH=path)
        assert done.returncode == 0, done.stderr
        assert "versions" in done.stdout
    calls = (worker.home / "uv-calls").read_text().splitlines()
    install = (
        "uv pip install --quiet --python .venv/bin/python --reinstall-package jaxtune "
        f"{worker.home}/.jaxtune/source[tpu]"
    )
    assert calls == ["uv venv --quiet --python 3.12 .venv", install, install]
    secrets = worker.home / ".jaxtune" / "secrets.env"
    assert secrets.stat().st_mode & 0o777 == 0o600
    assert secrets.parent.stat().st_mode & 0o777 == 0o700
    assert not (worker.home / "jaxtune-secrets.env").exists()
    assert (worker.home / ".jaxtune" / "source" / "pyproject.toml").exists()


@pytest.fixture
def tools(worker: Worker) -> Path:
    """PATH entries of a VM with a bucket: what is mounted is the file ~/mounted."""
    folder = worker.home / "tools"
    folder.mkdir()
    for name, text in _TOOLS.items():
        (folder / name).write_text(f'#!/bin/bash\necho "{name} $*" >>"$HOME/calls"\n{text}')
        (folder / name).chmod(0o755)
    return folder


_TOOLS = {
    "uv": "",
    "sudo": 'case $1 in mkdir | chown) ;; tee) cat >/dev/null ;; *) "$@" ;; esac\n',
    "mountpoint": '[[ -f $HOME/mounted && $(cat "$HOME/mounted") != stale ]]\n',
    "fusermount": '[[ -f $HOME/mounted && ! -f $HOME/busy ]] && rm "$HOME/mounted"\n',
    # what stays of one that died is in the way of the next
    "gcsfuse": '[[ ! -f $HOME/mounted ]] && echo "${@: -2:1}" >"$HOME/mounted"\n',
    "sleep": "",
    "curl": "",
    "lsb_release": "echo jammy\n",
    "apt-get": """
case $* in
  *update) (($(grep -c '^apt-get .*update' "$HOME/calls") > 2)) || exit 100 ;;
  *install*) mv "$HOME/gcsfuse" "$HOME/tools/" ;;
esac
""",
}


def test_a_vm_that_was_started_anew_has_its_bucket(worker: Worker, tools: Path) -> None:
    path, mounted = f"{tools}:{os.environ['PATH']}", worker.home / "mounted"
    run = ("train", "--output_dir", "/mnt/jaxtune/out", "0")
    done = worker.run("setup", "jaxtune[tpu]", "bucket-a", PATH=path)
    assert done.returncode == 0, done.stderr
    assert mounted.read_text() == "bucket-a\n"
    for left in ("nothing", "what a gcsfuse that died leaves"):
        mounted.unlink()
        if left != "nothing":
            mounted.write_text("stale")
        done = worker.run("start", *run, PATH=path)
        assert done.returncode == 0, done.stderr
        worker.wait("exit 0")
        assert mounted.read_text() == "bucket-a\n"


@pytest.mark.parametrize("verb", ["start", "ensure"])
@pytest.mark.parametrize("words", [("--output_dir", "/mnt/jaxtune/x"), ("--dataset=/mnt/jaxtune",)])
def test_nothing_is_written_where_a_bucket_should_be(
    worker: Worker, tools: Path, verb: str, words: tuple[str, ...]
) -> None:
    path = f"{tools}:{os.environ['PATH']}"
    done = worker.run(verb, "train", *words, "0", PATH=path)
    assert done.returncode == 2
    assert f"nothing is mounted at /mnt/jaxtune, but '{words[-1]}' is to be there" in done.stderr
    assert worker.state() == "absent"
    (worker.home / "mounted").write_text("by somebody else\n")
    assert worker.run(verb, "train", *words, "0", PATH=path).returncode == 0
    worker.wait("exit 0")
    (worker.home / "mounted").unlink()
    assert worker.run(verb, "train", "--output_dir", "gs://b/mnt/jaxtune", "0").returncode == 0


def test_another_bucket_takes_the_place_of_the_first(worker: Worker, tools: Path) -> None:
    path, mounted = f"{tools}:{os.environ['PATH']}", worker.home / "mounted"
    assert worker.run("setup", "jaxtune", "bucket-a", PATH=path).returncode == 0
    (worker.home / "busy").touch()
    done = worker.run("setup", "jaxtune", "bucket-b", PATH=path)
    assert done.returncode == 2
    assert "/mnt/jaxtune is gs://bucket-a and in use" in done.stderr
    assert worker.run("setup", "jaxtune", "bucket-a", PATH=path).returncode == 0  # it stays
    (worker.home / "busy").unlink()
    done = worker.run("setup", "jaxtune", "bucket-b", PATH=path)
    assert done.returncode == 0, done.stderr
    assert mounted.read_text() == "bucket-b\n"
    assert (worker.home / ".jaxtune" / "bucket").read_text() == "bucket-b\n"


def test_a_fresh_vm_that_updates_itself_is_waited_for(worker: Worker, tools: Path) -> None:
    (tools / "gcsfuse").rename(worker.home / "gcsfuse")
    clean = ":".join(p for p in os.environ["PATH"].split(":") if not Path(p, "gcsfuse").exists())
    done = worker.run("setup", "jaxtune", "bucket-a", PATH=f"{tools}:{clean}")
    assert done.returncode == 0, done.stderr
    calls = (worker.home / "calls").read_text().splitlines()
    assert [call for call in calls if call.startswith(("sleep", "apt-get"))] == [
        *["apt-get -qq update", "sleep 10"] * 2,
        "apt-get -qq update",
        "apt-get -o DPkg::Lock::Timeout=600 -qq install -y gcsfuse",
    ]
    assert (worker.home / "mounted").read_text() == "bucket-a\n"


def test_of_a_source_that_was_sent_before_nothing_is_left(worker: Worker, tools: Path) -> None:
    path = f"{tools}:{os.environ['PATH']}"
    send(worker, worker.home, "jaxtune/__init__.py", "jaxtune/old.py", "configs/a.yaml")
    assert worker.run("setup", ".[tpu]", PATH=path).returncode == 0
    assert (worker.home / "jaxtune" / "configs" / "a.yaml").exists()  # as --config names it
    # python -m looks into the working directory first
    assert not (worker.home / "jaxtune" / "jaxtune").exists()
    send(worker, worker.home, "jaxtune/__init__.py", "configs/b.yaml")
    assert worker.run("setup", ".[tpu]", PATH=path).returncode == 0
    source = worker.home / ".jaxtune" / "source"
    files = sorted(str(p.relative_to(source)) for p in source.rglob("*.*"))
    assert files == ["configs/b.yaml", "jaxtune/__init__.py"]
    assert [p.name for p in (worker.home / "jaxtune" / "configs").iterdir()] == ["b.yaml"]


def test_a_secret_that_is_not_sent_again_stays(worker: Worker, tools: Path) -> None:
    path, sent = f"{tools}:{os.environ['PATH']}", worker.home / "jaxtune-secrets.env"
    for lines in ("HF_TOKEN=one\nWANDB_API_KEY=$'a\\nb'\n", "HF_TOKEN=two\n"):
        sent.write_text(lines)
        assert worker.run("setup", "jaxtune", PATH=path).returncode == 0
        assert not sent.exists()
    kept = worker.home / ".jaxtune" / "secrets.env"
    assert kept.read_text() == "HF_TOKEN=two\nWANDB_API_KEY=$'a\\nb'\n"
    assert kept.stat().st_mode & 0o777 == 0o600


def test_setup_during_a_run_does_not_disturb_its_end(worker: Worker) -> None:
    # bash reads a script as it goes: what follows in another version of it must not be run
    worker.run("start", "train", "--wait", "0")
    worker.begun()
    script = worker.home / "jaxtune-worker.sh"
    text = script.read_text()
    script.write_text(text + "echo from the new script\n")
    worker.run("stop", "train")
    time.sleep(1)
    script.write_text(text)
    worker.wait("exit 75")
    assert "from the new script" not in worker.log()


def test_ensure_starts_what_does_not_run(worker: Worker) -> None:
    assert worker.run("ensure", "train", "--wait", "0").returncode == 0
    worker.begun()
    done = worker.run("ensure", "train", "--wait", "0")
    assert done.returncode == 0
    assert "train is running already" in done.stdout
    worker.run("stop", "train")
    worker.wait("exit 75")


def test_what_it_cannot_do_it_says(worker: Worker) -> None:
    done = worker.run("bogus")
    assert done.returncode == 2
    assert "jaxtune-worker.sh start RUN" in done.stdout
