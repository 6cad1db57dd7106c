"""create, setup, launch, status and delete against a cloud that answers by script."""

from __future__ import annotations

import os
import pty
import subprocess

import pytest
from fake_cloud import ABSENT, ROOT, SCRIPTS, Cloud, hours_ago

SLICE = ("--name", "tune", "--zone", "us-west4-a")
CREATE = ("create.sh", *SLICE, "--accelerator_type", "v5e-16", "--spot")


def test_create_waits_through_the_queue(cloud: Cloud) -> None:
    cloud.answers(
        "states",
        ABSENT,
        *("WAITING_FOR_RESOURCES|||||", "PROVISIONING|||||", "!UNAVAILABLE: try again"),
        "ACTIVE||v5litepod-16|||",
    )
    cloud.answers("vms", ABSENT, "CREATING", "READY")
    done = cloud.run(*CREATE)
    assert done.returncode == 0, done.stderr
    states = ["WAITING_FOR_RESOURCES", "PROVISIONING", "UNKNOWN", "CREATING", "ACTIVE"]
    assert done.stderr.splitlines() == [f"tune: {state}" for state in states]
    assert cloud.verbs() == ["create"]
    assert cloud.calls.count("sleep 30") == 4


@pytest.mark.parametrize(
    ("code", "answer", "message"),
    [
        (2, "!RESOURCE_EXHAUSTED: Quota limit 'TPUS' has been exceeded.", "no room for 16 chips"),
        (2, "!PERMISSION_DENIED: tpu.nodes.create", "not created. gcloud says: ERROR: PERMISSION"),
        (2, "!INVALID_ARGUMENT: no such type", "not created. gcloud says: ERROR: INVALID"),
        (75, "!UNAVAILABLE: try again", "not created. gcloud says: ERROR: UNAVAILABLE"),
    ],
)
def test_create_passes_on_a_refusal(cloud: Cloud, code: int, answer: str, message: str) -> None:
    cloud.answers("creates", answer)
    done = cloud.run(*CREATE)
    assert done.returncode == code
    assert message in done.stderr
    assert answer[1:20] in done.stderr


@pytest.mark.parametrize(
    ("state", "code", "message"),
    [
        ("FAILED|||||no capacity in the zone", 2, "the request failed: no capacity in the zone"),
        ("SUSPENDED|||||", 75, "taken away before it was used (SUSPENDED)"),
        (ABSENT, 2, "somebody deleted it"),
    ],
)
def test_create_ends_when_nothing_will_come(
    cloud: Cloud, state: str, code: int, message: str
) -> None:
    cloud.answers("states", ABSENT, "PROVISIONING|||||", state)
    done = cloud.run(*CREATE)
    assert done.returncode == code
    assert message in done.stderr


def test_create_does_not_touch_what_is_there(cloud: Cloud) -> None:
    cloud.answers("states", "ACTIVE||v5litepod-16|||")
    cloud.answers("vms", "READY")
    done = cloud.run(*CREATE)
    assert done.returncode == 2
    assert "tune exists already and is ACTIVE" in done.stderr
    assert cloud.verbs() == []


def test_several_slices_are_several_vms(cloud: Cloud) -> None:
    cloud.answers("states", ABSENT, "ACTIVE||v5litepod-16|2||")
    cloud.answers("vms", ABSENT, "READY")
    done = cloud.run(*CREATE, "--node_count", "2")
    assert done.returncode == 0, done.stderr
    made = next(call for call in cloud.calls if " create " in call)
    assert "--node-count=2 --node-prefix=tune" in made
    assert "--node-id" not in made
    cloud.run("launch.sh", *SLICE, "--", "--config", "a b.yaml")
    told = [call for call in cloud.calls if "worker.sh start" in call]
    assert ["ssh tune-0 " in told[0], "ssh tune-1 " in told[1], len(told)] == [True, True, 2]
    assert "start train --config 'a b.yaml'" in told[0]


def test_a_vm_that_was_not_queued_will_do(cloud: Cloud) -> None:
    cloud.answers("vms", "READY|2026-11-24T01:00:00Z|v6e-8")
    assert cloud.run("setup.sh", *SLICE, "--package", "jaxtune[tpu]").returncode == 0
    assert cloud.verbs() == ["setup"]
    assert "setup 'jaxtune[tpu]'" in cloud.calls[-1]
    cloud.answers("vms", "READY|2026-11-24T01:00:00Z|v6e-8", ABSENT)
    assert cloud.run("delete.sh", *SLICE, "--yes").returncode == 0
    assert cloud.verbs() == ["setup", "delete vm"]


def test_setup_sends_what_is_committed(cloud: Cloud) -> None:
    cloud.answers("states", "ACTIVE||v5litepod-16|||")
    cloud.answers("vms", "READY")
    done = cloud.run("setup.sh", *SLICE, "--bucket", "my-bucket")
    assert done.returncode == 0, done.stderr
    sent = cloud.folder / "sent"
    assert sorted(p.name for p in sent.iterdir()) == [
        "jaxtune-source.tar.gz",
        "jaxtune-worker.sh",
    ]
    names = subprocess.run(
        ["tar", "-tzf", sent / "jaxtune-source.tar.gz"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {"pyproject.toml", "jaxtune/train.py", "configs/llama-3.1-8b.yaml"} <= set(names)
    assert "setup '.[tpu,gcs]' my-bucket" in cloud.calls[-1]


@pytest.mark.parametrize("script", ["setup.sh", "logs.sh", "launch.sh"])
def test_a_slice_that_is_not_there_or_not_ready(cloud: Cloud, script: str) -> None:
    words = (*SLICE, "--", "--config", "c") if script == "launch.sh" else SLICE
    done = cloud.run(script, *words)
    assert done.returncode == 2
    assert "no such slice in us-west4-a. Make it: tpu_scripts/create.sh" in done.stderr
    cloud.answers("states", "ACTIVE||v5litepod-16|||")
    cloud.answers("vms", "PREEMPTED")
    done = cloud.run(script, *words)
    assert done.returncode == 2
    assert "tune is PREEMPTED, not ACTIVE" in done.stderr
    cloud.answers("states", "!UNAUTHENTICATED: run gcloud auth login")
    done = cloud.run(script, *words)
    assert "run gcloud auth login" in done.stderr
    assert cloud.verbs() == []


def test_status_tells_time_and_money(cloud: Cloud) -> None:
    cloud.answers("states", f"ACTIVE|{hours_ago(30)}|v5litepod-16|2|24|")
    cloud.answers("vms", "READY")
    cloud.answers("reports", "jaxtune-status w-0 running;jaxtune-status w-1 exit 0")
    done = cloud.run("status.sh", *SLICE, "--price_per_chip_hour", "1.5")
    assert done.returncode == 0, done.stderr
    assert "2 x v5litepod-16 = 32 chips, requested 30.0 hours ago, 48.00 an hour" in done.stderr
    assert "at most 1440.00 so far" in done.stderr
    assert "PAST ITS --max_hours 24" in done.stderr
    assert "jaxtune-status w-1 exit 0" in done.stdout
    cloud.answers("states", f"SUSPENDED|{hours_ago(2)}|v4-16|||")
    done = cloud.run("status.sh", *SLICE)
    assert "tune: SUSPENDED, 1 x v4-16 = 8 chips, requested 2.0 hours ago" in done.stderr


def test_delete_asks_unless_told_not_to(cloud: Cloud) -> None:
    cloud.answers("states", f"ACTIVE|{hours_ago(1)}|v5litepod-16|||")
    cloud.answers("vms", "READY")
    done = cloud.run("delete.sh", *SLICE)
    assert done.returncode == 2
    assert "run 'train' IS STILL RUNNING" in done.stderr
    assert "--yes deletes without asking" in done.stderr
    assert cloud.verbs() == []


@pytest.mark.parametrize(("typed", "code"), [("tune", 0), ("yes", 2), ("", 2)])
def test_delete_wants_the_name_typed(cloud: Cloud, typed: str, code: int) -> None:
    cloud.answers("states", f"ACTIVE|{hours_ago(1)}|v5litepod-16|||", ABSENT)
    cloud.answers("vms", "READY", ABSENT)
    keyboard, screen = pty.openpty()
    os.write(keyboard, f"{typed}\n".encode())
    environment = {"CLOUD": str(cloud.folder), "PATH": f"{cloud.path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [SCRIPTS / "delete.sh", *SLICE],
        stdin=screen,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        check=False,
        timeout=30,
    )
    os.close(keyboard)
    os.close(screen)
    assert done.returncode == code, done.stderr
    assert cloud.verbs() == (["delete"] if code == 0 else [])
    assert ("deleted." in done.stderr) == (code == 0)


def test_delete_looks_again(cloud: Cloud) -> None:
    cloud.answers("states", f"ACTIVE|{hours_ago(1)}|v5litepod-16|||")
    cloud.answers("vms", "READY")
    cloud.answers("deletes", "kept")
    done = cloud.run("delete.sh", *SLICE, "--yes")
    assert cloud.verbs() == ["delete"] * 5
    assert done.returncode == 2
    assert "NOT DELETED, it is still there (ACTIVE) AND MAY COST" in done.stderr
    cloud.answers("deletes", "!UNAVAILABLE: try again", "")
    done = cloud.run("delete.sh", *SLICE, "--yes")
    assert done.returncode == 0, done.stderr
    assert "gcloud has not deleted it" in done.stderr
    assert "tune: deleted." in done.stderr


@pytest.mark.parametrize("words", [(), ("--price_per_chip_hour", "1")])
def test_a_type_that_these_scripts_do_not_make_can_be_deleted(
    cloud: Cloud, words: tuple[str, ...]
) -> None:
    for made, said in [("v3-8", "1 x v3-8 = 4 chips"), ("v9x-2x2", "1 x v9x-2x2, requested 2.0")]:
        cloud.answers("vms", f"READY|{hours_ago(2)}|{made}")
        assert said in cloud.run("status.sh", *SLICE, *words).stderr
        done = cloud.run("delete.sh", *SLICE, "--yes", *words)
        assert done.returncode == 0, done.stderr
        assert "tune: deleted." in done.stderr
    assert cloud.verbs() == ["delete vm", "delete vm"]


@pytest.mark.parametrize(
    ("vms", "state"),
    [
        (("PREEMPTED", "REPAIRING"), "PREEMPTED"),
        (("REPAIRING", "PREEMPTED"), "PREEMPTED"),
        (("!UNAVAILABLE: no route", "CREATING"), "UNKNOWN"),
        (("CREATING", "READY"), "CREATING"),
        (("STOPPED", "!UNAVAILABLE: no route"), "STOPPED"),
    ],
)
def test_the_worst_vm_decides(cloud: Cloud, vms: tuple[str, ...], state: str) -> None:
    cloud.answers("states", "ACTIVE||v5litepod-16|2||")
    cloud.answers("vms", *vms)
    done = cloud.run("status.sh", *SLICE)
    assert f"tune: {state}" in done.stderr
    assert ("no route" in done.stderr) == (state == "UNKNOWN")


def test_delete_says_when_it_cannot_know(cloud: Cloud) -> None:
    cloud.answers("states", "!UNAVAILABLE: no route")
    done = cloud.run("delete.sh", *SLICE, "--yes")
    assert done.returncode == 2
    assert "Nothing was deleted; it may still cost." in done.stderr
    cloud.answers("states", ABSENT)
    done = cloud.run("delete.sh", *SLICE, "--yes")
    assert done.returncode == 0
    assert "Nothing to delete" in done.stderr
    assert cloud.verbs() == []


def test_fetch_from_a_bucket_asks_no_slice(cloud: Cloud) -> None:
    to = cloud.folder / "results"
    done = cloud.run("fetch.sh", "--from", "gs://b/llama/", "--to", str(to), "--what", "hf,adapter")
    assert done.returncode == 0, done.stderr
    assert to.is_dir()
    assert cloud.calls == [
        f"gcloud storage cp --recursive gs://b/llama/hf {to}/",
        f"gcloud storage cp --recursive gs://b/llama/adapter {to}/",
    ]
