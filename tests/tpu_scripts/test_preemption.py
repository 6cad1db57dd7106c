"""The loop that keeps a run going: preemptions, exit codes, failures, and what it may not cost."""

from __future__ import annotations

import re
import shutil

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
    cloud.answers("lives", f"WAITING_FOR_RESOURCES|||||;{ACTIVE}", f"PROVISIONING|||||;{ACTIVE}")
    gone = "gone:SUSPENDING|||||"
    cloud.answers("reports", BARE, RUNNING, gone, BARE, RUNNING, ended(0, 0))
    done = cloud.run(*WORDS, *TRAIN)
    assert done.returncode == 0, done.stderr
    once = ["create", "setup", "start", "delete"]
    assert cloud.verbs() == [*once, *once]
    for state in ("WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDING", "PROVISIONING"):
        assert f"tune: {state}" in done.stderr
    assert "run 'train' is done." in done.stderr
    # a connection to a VM that is gone ends, or nobody looks at the clock any more
    told = [call for call in cloud.calls if "tpu-vm ssh" in call or "tpu-vm scp" in call]
    assert len(told) > 8
    assert all("-oServerAliveInterval=30" in call for call in told)


def test_a_vm_preempted_under_an_active_request(cloud: Cloud) -> None:
    cloud.answers("lives", ACTIVE)
    cloud.answers("states", ACTIVE)
    cloud.answers("vms", "PREEMPTED")
    cloud.answers("reports", ended(0))
    assert cloud.run(*WORDS, *TRAIN).returncode == 0
    assert cloud.verbs() == ["delete", "create", "delete"]


def test_taken_away_before_it_was_used(cloud: Cloud) -> None:
    cloud.answers("lives", "PROVISIONING|||||;SUSPENDED|||||", ACTIVE)
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


@pytest.mark.parametrize("code", [134, 75, 2])
def test_an_end_that_was_a_preemption_is_no_failure(cloud: Cloud, code: int) -> None:
    # the peers of a host that goes end, and only then the slice says so: four times in a row
    cloud.answers("lives", *[f"{ACTIVE};SUSPENDED|||||"] * 4, ACTIVE)
    cloud.answers("reports", *[ended(code, code)] * 4, ended(0, 0))
    done = cloud.run(*WORDS, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "delete"] * 5


def test_bad_input_is_left_for_a_person(cloud: Cloud) -> None:
    cloud.answers("states", ACTIVE)
    cloud.answers("reports", ended(2, 2))
    cloud.answers("ssh", "the last line of the log")
    done = cloud.run(*WORDS, *TRAIN)
    assert done.returncode == 2
    assert "refuses its input (exit 2)" in done.stderr
    assert "the last line of the log" in done.stderr
    assert cloud.verbs() == []  # --delete_when_done or not: a result may wait there for its copy
    assert "tune is not deleted after exit 2" in done.stderr
    assert "is still there and costs. Fetch what you want" in done.stderr


@pytest.mark.parametrize("code", [75, 1])
def test_what_trained_for_a_while_may_fail_again(cloud: Cloud, code: int) -> None:
    cloud.answers("states", ACTIVE)
    words = (*WORDS, "--poll_seconds", "3600", "--max_hours", "100")
    cloud.answers("reports", *[*[RUNNING] * 3, ended(code, code)] * 4, ended(0, 0))
    done = cloud.run(*words, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == [*["start"] * 4, "delete"]


def test_75_over_and_over_is_a_failure(cloud: Cloud) -> None:
    # a host that cannot be joined, whenever it is tried
    cloud.answers("states", ACTIVE)
    cloud.answers("reports", ended(75, 75))
    done = cloud.run(*WORDS, *TRAIN)
    assert done.returncode == 1
    assert "has failed 3 times (exit 75)" in done.stderr
    assert cloud.verbs() == ["start", "start", "delete"]


def test_workers_that_were_not_started_are(cloud: Cloud) -> None:
    cloud.answers("states", ACTIVE)
    absent = "jaxtune-status w-1 absent"
    cloud.answers(
        "reports",
        *(f"jaxtune-status w-0 running;{absent}", f"jaxtune-status w-0 exit 2;{absent}"),
        *(RUNNING, ended(0, 0)),
    )
    assert cloud.run(*WORDS, *TRAIN).returncode == 0
    # `ensure`: where it runs that is no error; what one says that was alone is not believed
    assert cloud.verbs() == ["ensure", "setup", "start", "delete"]


def test_what_cannot_be_set_up_does_not_cost_for_ever(cloud: Cloud) -> None:
    cloud.answers("states", ACTIVE)
    cloud.answers("vms", "READY")
    cloud.answers("reports", BARE)
    cloud.answers("ssh", "!uv: no such package")
    done = cloud.run(*WORDS, *TRAIN)
    assert done.returncode == 1
    assert cloud.verbs() == [*["setup"] * 3, "delete"]
    assert "could not be set up or launched 3 times in a row" in done.stderr


def test_what_launching_cannot_do_setting_up_may(cloud: Cloud) -> None:
    # a VM that was started anew: its run is lost, and its bucket cannot be mounted
    cloud.answers("states", ACTIVE)
    cloud.answers("reports", ended(137), ended(137), RUNNING, ended(0))
    cloud.answers("starts", "!nothing is mounted at /mnt/jaxtune", "")
    done = cloud.run(*WORDS, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["start", "setup", "start", "delete"]


def test_no_answer_is_waited_for(cloud: Cloud) -> None:
    cloud.answers("states", "!UNAVAILABLE: no route", ACTIVE)
    cloud.answers("vms", "!UNAVAILABLE: no route", "READY")
    cloud.answers("reports", "!ssh: connect: timed out", RUNNING, ended(0))
    assert cloud.run(*WORDS, *TRAIN).returncode == 0
    assert cloud.verbs() == ["delete"]


def test_a_new_slice_that_never_answers_does_not_cost_for_ever(cloud: Cloud) -> None:
    cloud.answers("lives", ACTIVE)
    cloud.answers("reports", "!ssh: connect: timed out")
    done = cloud.run(*WORDS, "--poll_seconds", "400", *TRAIN)
    assert done.returncode == 1
    assert "have not answered for 30 minutes, and nothing was launched" in done.stderr
    assert cloud.verbs() == ["create", "delete"]
    assert cloud.calls.count("sleep 400") == 6


def test_a_run_that_does_not_answer_may_be_going_on(cloud: Cloud) -> None:
    cloud.answers("lives", ACTIVE)
    cloud.answers("reports", BARE, *["!ssh: connect: timed out"] * 12, ended(0))
    done = cloud.run(*WORDS, "--poll_seconds", "300", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "setup", "start", "delete"]


@pytest.mark.parametrize("why", ["RESOURCE_EXHAUSTED: Quota limit exceeded.", "PERMISSION_DENIED"])
def test_refused_for_good(cloud: Cloud, why: str) -> None:
    cloud.answers("creates", f"!{why}")
    done = cloud.run(*WORDS, *TRAIN)
    assert done.returncode == 2
    assert why in done.stderr
    assert cloud.verbs() == ["create"]


@pytest.mark.parametrize(
    "why", ["UNAVAILABLE: x", "RESOURCE_EXHAUSTED: Quota 'requests per minute'"]
)
def test_not_asked_for_just_now(cloud: Cloud, why: str) -> None:
    cloud.answers("lives", ACTIVE)
    cloud.answers("creates", f"!{why}", f"!{why}", "")
    cloud.answers("reports", ended(0))
    done = cloud.run(*WORDS, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == [*["create"] * 3, "delete"]
    (cloud.folder / "calls").unlink()
    cloud.answers("creates", f"!{why}")
    done = cloud.run(*WORDS, *TRAIN)
    assert done.returncode == 1
    assert "was asked for 3 times in a row and is not there" in done.stderr
    assert cloud.verbs() == ["create"] * 3


def test_what_is_asked_for_and_never_there(cloud: Cloud) -> None:
    done = cloud.run(
        *WORDS, *TRAIN
    )  # queued without a complaint, and somebody deletes it each time
    assert done.returncode == 1
    assert "was asked for 3 times in a row and is not there" in done.stderr
    assert cloud.verbs() == ["create"] * 3


def test_no_answer_before_asking(cloud: Cloud) -> None:
    # resume's look says it is gone, that of create is not answered
    cloud.answers("states", ABSENT, "!UNAVAILABLE: no route", ABSENT, ABSENT, ACTIVE)
    cloud.answers("reports", ended(0))
    done = cloud.run(*WORDS, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "delete"]


def test_a_slice_that_shows_late_is_not_asked_for_twice(cloud: Cloud) -> None:
    cloud.answers("states", ABSENT, "PROVISIONING|||||", ACTIVE)
    cloud.answers("reports", ended(0))
    done = cloud.run(*WORDS, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["delete"]


def test_requests_that_fail_are_tried_so_often(cloud: Cloud) -> None:
    # no capacity until the request lapses: the usual end of one for spot
    cloud.answers("lives", "WAITING_FOR_RESOURCES|||||;FAILED|||||no capacity")
    done = cloud.run(*WORDS, *TRAIN)
    assert done.returncode == 1
    assert cloud.verbs() == ["create", "delete"] * 3
    assert "3 requests failed: no capacity" in done.stderr


def test_a_request_that_failed_is_made_again(cloud: Cloud) -> None:
    cloud.answers("lives", *["FAILED|||||no capacity"] * 2, ACTIVE)
    cloud.answers("reports", ended(0))
    done = cloud.run(*WORDS, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "delete"] * 3


def test_max_hours_delete_the_slice(cloud: Cloud) -> None:
    # an hour is left when the script begins; the clock goes on with every look
    cloud.answers("states", f"ACTIVE|{hours_ago(3)}|v5litepod-16|||")
    done = cloud.run(*WORDS, "--max_hours", "4", "--poll_seconds", "1300", *TRAIN)
    assert done.returncode == 75
    assert "--max_hours 4 are over; deleting it" in done.stderr
    assert cloud.verbs() == ["delete"]
    assert cloud.calls.count("sleep 1300") == 3


def test_max_hours_count_while_it_waits(cloud: Cloud) -> None:
    cloud.answers("lives", "WAITING_FOR_RESOURCES|||||")
    done = cloud.run(*WORDS, "--max_hours", "1", "--poll_seconds", "1200", *TRAIN)
    assert done.returncode == 75
    assert cloud.verbs() == ["create", "delete"]


def test_past_max_hours_nothing_is_asked_for(cloud: Cloud) -> None:
    cloud.answers("states", f"ACTIVE|{hours_ago(0.9)}|v5litepod-16|||")
    cloud.answers("lives", ACTIVE)
    cloud.answers("reports", "gone:SUSPENDED|||||")
    done = cloud.run(*WORDS, "--max_hours", "1", "--poll_seconds", "300", *TRAIN)
    assert done.returncode == 75
    assert "--max_hours 1 are over; it is not asked for again" in done.stderr
    assert cloud.verbs() == ["delete"]


@pytest.mark.parametrize(("words", "label"), [((), "72"), (("--max_hours", "72"), "24")])
def test_the_hours_on_the_slice_hold(cloud: Cloud, words: tuple[str, ...], label: str) -> None:
    cloud.answers("states", f"ACTIVE|{hours_ago(30)}|v5litepod-16||{label}|")
    cloud.answers("lives", ACTIVE)
    cloud.answers("reports", RUNNING, "gone:SUSPENDED|||||", ended(0))
    done = cloud.run(*WORDS, *words, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["delete", "create", "delete"]
    # and go over to the next one
    assert any("create" in call and "jaxtune_max_hours=72" in call for call in cloud.calls)


def test_what_is_past_its_hours_already_is_not_deleted_unasked(cloud: Cloud) -> None:
    cloud.answers("states", f"ACTIVE|{hours_ago(30)}|v5litepod-16|||")
    done = cloud.run(*WORDS, *TRAIN)
    assert done.returncode == 2
    assert "was asked for 30.0 hours ago and is PAST ITS --max_hours 24" in done.stderr
    assert "AND COSTS" in done.stderr
    assert cloud.verbs() == []


def test_a_delete_that_fails_is_repeated(cloud: Cloud) -> None:
    cloud.answers("states", ACTIVE)
    cloud.answers("reports", ended(0))
    cloud.answers("deletes", "!UNAVAILABLE: try again", "kept", "")
    done = cloud.run(*WORDS, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["delete"] * 3


@pytest.mark.parametrize(
    ("age", "reports", "code"), [(0, ended(0), 1), (0, ended(3), 3), (3.9, RUNNING, 1)]
)
def test_what_cannot_be_deleted_is_shouted(
    cloud: Cloud, age: float, reports: str, code: int
) -> None:
    cloud.answers("states", f"ACTIVE|{hours_ago(age)}|v5litepod-16|||")
    cloud.answers("reports", reports)
    cloud.answers("deletes", "!UNAVAILABLE: try again")
    done = cloud.run(*WORDS, "--max_hours", "4", "--poll_seconds", "400", *TRAIN)
    assert done.returncode == code
    assert cloud.verbs() == ["delete"] * 20
    assert "NOT DELETED, it is still there (ACTIVE) AND MAY COST" in done.stderr


OURS_NOT = ("resume.sh", "--name", "tune", "--zone", "us-west4-a", "--package", "jaxtune[tpu]")


def test_a_vm_of_somebody_else_is_used_and_left(cloud: Cloud) -> None:
    cloud.answers("vms", f"READY|{hours_ago(72)}|v5litepod-16")
    cloud.answers("reports", BARE, RUNNING, ended(0, 0))
    done = cloud.run(*OURS_NOT, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["setup", "start"]
    assert "tune is still there and costs" in done.stderr


def test_a_vm_of_somebody_else_outlives_max_hours(cloud: Cloud) -> None:
    # counted from the start of the script: its age is nothing to us
    cloud.answers("vms", f"READY|{hours_ago(72)}|v5litepod-16")
    done = cloud.run(*OURS_NOT, "--max_hours", "1", "--poll_seconds", "1300", *TRAIN)
    assert done.returncode == 75
    assert "not asked for by these scripts and is left as it is, AND COSTS" in done.stderr
    assert cloud.verbs() == []
    assert cloud.calls.count("sleep 1300") == 3


def test_a_vm_of_somebody_else_is_not_to_be_deleted_when_done(cloud: Cloud) -> None:
    cloud.answers("vms", f"READY|{hours_ago(1)}|v5litepod-16")
    done = cloud.run(*OURS_NOT, "--delete_when_done", *TRAIN)
    assert done.returncode == 2
    assert "--delete_when_done: tune was not asked for by these scripts" in done.stderr
    assert cloud.verbs() == []


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("STOPPED", "Start it yourself"),
        ("STOPPING", "Start it yourself"),
        ("PREEMPTED", "Delete it"),
    ],
)
def test_a_vm_of_somebody_else_that_does_not_run(cloud: Cloud, state: str, message: str) -> None:
    cloud.answers("vms", f"{state}|{hours_ago(2)}|v5litepod-8")
    done = cloud.run(*OURS_NOT, "--accelerator_type", "v5e-8", *TRAIN)
    assert done.returncode == 2
    assert message in done.stderr
    assert cloud.verbs() == []


def test_what_somebody_stopped_is_not_deleted(cloud: Cloud) -> None:
    cloud.answers("states", ACTIVE)
    cloud.answers("vms", "STOPPED")
    done = cloud.run(*WORDS, *TRAIN)
    assert done.returncode == 2
    assert "tune is STOPPED: somebody stopped it" in done.stderr
    assert cloud.verbs() == []


def test_after_a_preemption_the_same_commit_is_sent(cloud: Cloud) -> None:
    git = shutil.which("git")
    (cloud.path / "git").write_text(
        f'#!/bin/bash\nprintf "%s\\n" "git $*" >>"$CLOUD/calls"\nexec {git} "$@"\n'
    )
    (cloud.path / "git").chmod(0o755)
    cloud.answers("lives", ACTIVE, ACTIVE)
    cloud.answers("reports", BARE, "gone:SUSPENDED|||||", BARE, ended(0))
    words = [word for word in WORDS if word not in ("--package", "jaxtune[tpu]")]
    done = cloud.run(*words, *TRAIN)
    assert done.returncode == 0, done.stderr
    sent = [call.split()[-1] for call in cloud.calls if " archive " in call]
    assert len(sent) == 2
    assert sent[0] == sent[1]
    assert re.fullmatch("[0-9a-f]{40}", sent[0])  # not HEAD, which may be another one by then
    done = cloud.run(*words, "--commit", "no-such-commit", *TRAIN)
    assert done.returncode == 2
    assert "no commit 'no-such-commit' here" in done.stderr


def test_what_is_wrong_is_said_before_it_costs(cloud: Cloud) -> None:
    for words, message in [
        (("--copy", "gone.jsonl", *TRAIN), "no such file: gone.jsonl"),
        ((*TRAIN, "hf_verysecret"), "HF_TOKEN stands among the arguments"),
    ]:
        done = cloud.run(*WORDS, *words, HF_TOKEN="hf_verysecret")
        assert done.returncode == 2
        assert message in done.stderr
    assert cloud.calls == []


def test_a_vm_of_somebody_else_cannot_be_asked_for_again(cloud: Cloud) -> None:
    words = ("resume.sh", "--name", "tune", "--zone", "us-west4-a", *TRAIN)
    done = cloud.run(*words)
    assert done.returncode == 2
    assert "without --accelerator_type it cannot be asked for again" in done.stderr
