"""What holds for every script: shellcheck, --help, --dry_run, bad flags, no secrets shown."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cloud import SCRIPTS, Cloud

SLICE = ("--name", "tune", "--zone", "us-west4-a")
TRAIN = ("--", "--config", "c.yaml", "--output_dir", "/mnt/jaxtune/out")
# script -> flags with which it has something to do
WORDS = {
    "create.sh": (*SLICE, "--accelerator_type", "v5e-16", "--spot"),
    "setup.sh": (*SLICE, "--bucket", "my-bucket"),
    "launch.sh": (*SLICE, "--copy", "README.md", *TRAIN),
    "logs.sh": SLICE,
    "status.sh": SLICE,
    "fetch.sh": (*SLICE, "--from", "out", "--to", "never-made"),
    "delete.sh": SLICE,
    "resume.sh": (*SLICE, "--accelerator_type", "v5e-16", "--bucket", "my-bucket", *TRAIN),
    "gke.sh": (
        *("--name", "tune", "--accelerator_type", "v5e-16", "--image", "r/j", "--bucket", "b1"),
        *TRAIN,
    ),
    "slurm.sh": TRAIN[1:],
    "worker.sh": (),
}
ASKED = sorted(name for name in WORDS if name not in ("worker.sh", "slurm.sh"))


def test_the_table_names_every_script() -> None:
    assert sorted(WORDS) == sorted(p.name for p in SCRIPTS.glob("*.sh") if p.name != "lib.sh")


def test_shellcheck_finds_nothing() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.fail("shellcheck is not installed: pip install 'jaxtune[test]'")
    files = sorted(str(p) for p in SCRIPTS.glob("*.sh"))
    done = subprocess.run([shellcheck, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", sorted(WORDS))
def test_help_says_what_the_script_reads(cloud: Cloud, name: str) -> None:
    done = cloud.run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert cloud.calls == []
    assert len(done.stdout.splitlines()) > 5
    source = (SCRIPTS / name).read_text()
    for flag in re.findall(r"(\w+)[=+]? ?", _declared(source)):
        assert f"--{flag}" in done.stdout, f"--{flag} is not in the help of {name}"


def _declared(source: str) -> str:
    found = re.search(r'^parse "(.*?)" "\$@"', source, re.S | re.M)
    # resume.sh names the flags of the scripts it calls as theirs
    if found is None or "The flags of create.sh" in source:
        return ""
    return found[1].replace("\\\n", "")


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("dry", ["--dry_run", "--dry-run"])
def test_a_dry_run_shows_commands_and_runs_none(cloud: Cloud, name: str, dry: str) -> None:
    done = cloud.run(name, dry, *WORDS[name], HF_TOKEN="hf_verysecret")
    assert done.returncode == 0, done.stderr
    assert cloud.calls == []
    shown = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert shown
    for line in shown:  # what is shown can be pasted into a shell
        assert shlex.split(line[2:])[0] in ("gcloud", "kubectl", "git", "cp", "mkdir", "sleep")
    assert "hf_verysecret" not in done.stdout + done.stderr
    assert not (SCRIPTS.parent / "never-made").exists()


@pytest.mark.parametrize("name", ASKED)
def test_bad_flags_end_with_2_and_a_message(cloud: Cloud, name: str) -> None:
    for words, message in [
        (("--bogus", "1"), "unknown flag '--bogus'"),
        (("loose",), "'loose' belongs to no flag"),
        (("--name",), "--name needs a value"),
        (("--dry_run=1",), "--dry_run takes no value"),
    ]:
        done = cloud.run(name, *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
    assert cloud.calls == []


@pytest.mark.parametrize(
    "name", ["a;rm -rf x", "$(id)", "UPPER", "-x", "a b", ""], ids=lambda text: repr(text)
)
def test_a_name_cannot_be_a_command(cloud: Cloud, name: str) -> None:
    done = cloud.run("delete.sh", f"--name={name}", "--zone=us-west4-a", "--yes")
    assert done.returncode == 2
    assert "--name" in done.stderr
    assert cloud.calls == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("create.sh", *SLICE), "--accelerator_type is missing"),
        (("create.sh", *SLICE, "--accelerator_type", "v9-1"), "v4-N, v5e-N"),
        (("create.sh", *SLICE, "--accelerator_type", "tpu7x-8"), "through GKE"),
        (("create.sh", *WORDS["create.sh"], "--reserved"), "choose one"),
        (("create.sh", *WORDS["create.sh"], "--max_hours", "soon"), "--max_hours: a whole number"),
        (("setup.sh", *SLICE, "--bucket", "gs://b"), "without gs://"),
        (("launch.sh", *SLICE), "what to train is missing"),
        (("launch.sh", *SLICE, "--copy", "gone.jsonl", *TRAIN), "no such file: gone.jsonl"),
        (("launch.sh", *SLICE, "--run", "a/b", *TRAIN), "--run: letters"),
        (("logs.sh", *SLICE, "--worker", "x"), "--worker: a number or all"),
        (("fetch.sh", "--to", "x"), "--from is missing"),
        (("fetch.sh", "--from", "gs://b/x"), "--to is missing"),
        (("status.sh", "--name", "tune"), "--zone is missing"),
        (("delete.sh", *SLICE, "--price_per_chip_hour", "a lot"), "a number; got 'a lot'"),
        (("resume.sh", *SLICE), "what to train is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_what_is_missing_or_wrong_is_said(
    cloud: Cloud, words: tuple[str, ...], message: str
) -> None:
    done = cloud.run(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert cloud.calls == []


def test_types_of_tpu(cloud: Cloud) -> None:
    for asked, accelerator, image in [
        ("v5e-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5litepod-4", "v5litepod-4", "v2-alpha-tpuv5-lite"),
        ("v6e-8", "v6e-8", "v2-alpha-tpuv6e"),
        ("v5p-128", "v5p-128", "v2-alpha-tpuv5"),
        ("v4-8", "v4-8", "tpu-ubuntu2204-base"),
    ]:
        done = cloud.run("create.sh", *SLICE, "--dry_run", "--accelerator_type", asked)
        assert f"--accelerator-type={accelerator} --runtime-version={image} " in done.stdout
    done = cloud.run("create.sh", *WORDS["create.sh"], "--runtime_version", "mine", "--dry_run")
    assert "--runtime-version=mine " in done.stdout


def test_a_secret_travels_in_a_private_file_only(cloud: Cloud) -> None:
    cloud.answers("states", "ACTIVE||v5litepod-16|||")
    cloud.answers("vms", "READY")
    token, key = "hf_verysecret", "wandb 'quoted' $key"
    done = cloud.run("setup.sh", *SLICE, HF_TOKEN=token, WANDB_API_KEY=key)
    assert done.returncode == 0, done.stderr
    seen = "\n".join([*cloud.calls, done.stdout, done.stderr])
    assert token not in seen
    assert "quoted" not in seen
    file = cloud.folder / "sent" / "jaxtune-secrets.env"
    assert file.stat().st_mode & 0o777 == 0o600
    shown = subprocess.run(
        ["bash", "-c", f'. {file}; printf "%s|%s" "$HF_TOKEN" "$WANDB_API_KEY"'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == f"{token}|{key}"
    left = [name for name in os.listdir(cloud.folder) if name.startswith("jaxtune.")]
    assert left == []  # the temporary folder is gone


def test_a_secret_among_the_arguments_is_refused(cloud: Cloud) -> None:
    words = (*SLICE, "--", "--config", "c.yaml", "--hub_token", "hf_verysecret")
    done = cloud.run("launch.sh", *words, HF_TOKEN="hf_verysecret")
    assert done.returncode == 2
    assert "HF_TOKEN stands among the arguments" in done.stderr
    assert "hf_verysecret" not in done.stderr
    assert cloud.calls == []
