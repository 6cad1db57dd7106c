"""The loop that keeps a run going: preemptions, exit codes, failures, and what it may not cost."""

from __future__ import annotations

import pytest
from fake_cloud import ABSENT, Cloud, hours_ago

WORDS = (
    *("resume.sh", "--name", "tune", "--zone", "us-west4-a", "--accelerator_type", "v5e-16"),
    *("--spot", "--package", "jaxtune[tpu]", "--delete_when_done"),
)
TRAIN = ("--", "--config", "c.yaml")
ACTIVE = "ACTIVE||v5litepod-16|||"
BARE = "jaxtune-status w-0 bare;jaxtune-status w-1 bare"
RUNNING = "jaxtune-status w-0 running;jaxtune-status w-1 running"


def ended(*codes: int) -> str:
    return ";".join(f"jaxtune-status w-{i} exit {code}" for i, code in enumerate(codes))


def test_from_nothing_through_a_preemption_to_the_end(cloud: Cloud) -> None:
    cloud.answers(
        "states",
        # looked for by resume, looked for by create, queued, there
        *(ABSENT, ABSENT, "WAITING_FOR_RESOURCES|||||", ACTIVE),
        # bare; setup, launch; running
        *(ACTIVE, ACTIVE, ACTIVE, ACTIVE),
        # taken away; deleted; gone
        *("SUSPENDING|||||", "SUSPENDED|||||", ABSENT, ABSENT),
        *("PROVISIONING|||||", ACTIVE),
    )
    cloud.answers("vms", ABSENT, ABSENT, *["READY"] * 5, ABSENT, ABSENT, "READY")
    cloud.answers("reports", BARE, RUNNING, BARE, RUNNING, ended(0, 0))
    done = cloud.run(*WORDS, *TRAIN)
    assert done.returncode == 0, done.stderr
    once = ["create", "setup", "start"]
    assert cloud.verbs() == [*once, "delete", "delete", *once, "delete"]
    assert "tune: SUSPENDED" in done.stderr
    assert "run 'train' is done." in done.stderr


def test_a_vm_preempted_under_an_active_request(cloud: Cloud) -> None:
    cloud.answers("states", ACTIVE, ABSENT, ABSENT, ACTIVE)
    cloud.answers("vms", "PREEMPTED", ABSENT, ABSENT, "READY")
    cloud.answers("reports", ended(0))
    assert cloud.run(*WORDS, *TRAIN).returncode == 0
    assert cloud.verbs() == ["delete", "create", "delete"]


def test_taken_away_before_it_was_used(cloud: Cloud) -> None:
    cloud.answers(
        "states", ABSENT, ABSENT, "SUSPENDED|||||", "SUSPENDED|||||", ABSENT, ABSENT, ACTIVE
    )
    cloud.answers("vms", *[ABSENT] * 4, "READY")
    cloud.answers("reports", ended(0))
    done = cloud.run(*WORDS, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "delete", "create", "delete"]


def test_75_is_launched_again(cloud: Cloud) -> None:
    cloud.answers("states", ACTIVE)
    cloud.answers("vms", "READY")
    cloud.answers("reports", ended(75, 75), RUNNING, ended(0, 75), ended(0, 0))
    assert cloud.run(*WORDS, *TRAIN).returncode == 0
    assert cloud.verbs() == ["start", "start", "delete"]


@pytest.mark.parametrize(
    ("codes", "code", "message"),
    [
        ((2, 2), 2, "refuses its input (exit 2)"),
        ((3, 134), 3, "has diverged (exit 3)"),
        ((0, 3), 3, "has diverged (exit 3)"),
    ],
)
def test_what_would_only_come_again_stops(
    cloud: Cloud, codes: tuple[int, ...], code: int, message: str
) -> None:
    cloud.answers("states", ACTIVE)
    cloud.answers("vms", "READY")
    cloud.answers("reports", ended(*codes))
    cloud.answers("ssh", "the last line of the log")
    done = cloud.run(*WORDS, *TRAIN)
    assert done.returncode == code
    assert message in done.stderr
    assert "the last line of the log" in done.stderr
    assert cloud.verbs() == ["delete"]


def test_without_delete_when_done_the_bill_is_named(cloud: Cloud) -> None:
    cloud.answers("states", ACTIVE)
    cloud.answers("vms", "READY")
    cloud.answers("reports", ended(0))
    words = [word for word in WORDS if word != "--delete_when_done"]
    done = cloud.run(*words, *TRAIN)
    assert done.returncode == 0
    assert "tune is still there and costs" in done.stderr
    assert cloud.verbs() == []


def test_other_exits_are_tried_so_often(cloud: Cloud) -> None:
    cloud.answers("states", ACTIVE)
    cloud.answers("vms", "READY")
    cloud.answers("reports", ended(1, 134))
    done = cloud.run(*WORDS, *TRAIN, "--max_steps", "3")
    assert done.returncode == 1
    assert cloud.verbs() == ["start", "start", "delete"]
    assert "has failed 3 times (exit 134)" in done.stderr
    started = next(call for call in cloud.calls if "start" in call)
    assert "--config c.yaml --max_steps 3" in started


def test_a_crash_that_was_a_preemption_is_no_failure(cloud: Cloud) -> None:
    # the peers of a host that goes abort, and only then the slice says so: four times in a row
    once = (ACTIVE, "SUSPENDED|||||", ABSENT, ABSENT, ACTIVE)
    cloud.answers("states", *once * 4, ACTIVE)
    cloud.answers("vms", *("READY", ABSENT, ABSENT, "READY") * 4, "READY")
    cloud.answers("reports", *[ended(134, 134)] * 4, ended(0, 0))
    done = cloud.run(*WORDS, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs().count("create") == 4


def test_what_cannot_be_set_up_does_not_cost_for_ever(cloud: Cloud) -> None:
    cloud.answers("states", ACTIVE)
    cloud.answers("vms", "READY")
    cloud.answers("reports", BARE)
    cloud.answers("ssh", "!uv: no such package")
    done = cloud.run(*WORDS, *TRAIN)
    assert done.returncode == 1
    assert cloud.verbs() == [*["setup"] * 3, "delete"]
    assert "could not be set up or launched 3 times in a row" in done.stderr


def test_no_answer_is_waited_for(cloud: Cloud) -> None:
    cloud.answers("states", "!UNAVAILABLE: no route", ACTIVE)
    cloud.answers("vms", "!UNAVAILABLE: no route", "READY")
    cloud.answers("reports", "!ssh: connect: timed out", RUNNING, ended(0))
    assert cloud.run(*WORDS, *TRAIN).returncode == 0
    assert cloud.verbs() == ["delete"]


def test_refused_by_quota(cloud: Cloud) -> None:
    cloud.answers("creates", "!RESOURCE_EXHAUSTED: Quota limit exceeded.")
    done = cloud.run(*WORDS, *TRAIN)
    assert done.returncode == 2
    assert "the quota of this project has no room" in done.stderr
    assert cloud.verbs() == ["create"]


def test_requests_that_fail_are_tried_so_often(cloud: Cloud) -> None:
    cloud.answers("states", "FAILED|||||no capacity")
    done = cloud.run(*WORDS, *TRAIN)
    assert done.returncode == 1
    assert cloud.verbs() == ["delete"] * 3
    assert "3 requests failed: no capacity" in done.stderr


def test_max_hours_delete_the_slice(cloud: Cloud) -> None:
    cloud.answers("states", f"ACTIVE|{hours_ago(5)}|v5litepod-16|||")
    cloud.answers("vms", "READY")
    done = cloud.run(*WORDS, "--max_hours", "4", *TRAIN)
    assert done.returncode == 75
    assert "--max_hours 4 are over; deleting it" in done.stderr
    assert cloud.verbs() == ["delete"]


def test_a_vm_of_somebody_else_cannot_be_asked_for_again(cloud: Cloud) -> None:
    words = ("resume.sh", "--name", "tune", "--zone", "us-west4-a", *TRAIN)
    done = cloud.run(*words)
    assert done.returncode == 2
    assert "without --accelerator_type it cannot be asked for again" in done.stderr
