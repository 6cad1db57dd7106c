"""JobSet, SkyPilot, SLURM and Dockerfile: against schemas, linters, and how they behave."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_cloud import ROOT, SCRIPTS, Cloud

GKE = ("gke.sh", "--name", "tune", "--image", "r.dev/p/jaxtune:tpu", "--bucket", "my-bucket")
V5E = ("--accelerator_type", "v5e-16")
TRAIN = ("--", "--config", "c.yaml")


def manifest(cloud: Cloud, *words: str, train: tuple[str, ...] = TRAIN) -> dict[str, Any]:
    done = cloud.run(*GKE, "--print", *words, *train)
    assert done.returncode == 0, done.stderr
    assert "@" not in re.sub(r"args: .*", "", done.stdout)
    found = yaml.safe_load(done.stdout)
    assert isinstance(found, dict)
    return found


def job(found: dict[str, Any]) -> dict[str, Any]:
    spec = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


def pod(found: dict[str, Any]) -> dict[str, Any]:
    spec = job(found)["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


def unknown(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """What of `ours` the schema's own model did not take over: fields that it does not have."""
    if isinstance(ours, dict):
        lost = [f"{where}.{key}" for key in ours if key not in theirs]
        return lost + [
            line
            for key in ours
            if key in theirs
            for line in unknown(ours[key], theirs[key], f"{where}.{key}")
        ]
    if isinstance(ours, list):
        return [x for i, pair in enumerate(zip(ours, theirs, strict=True))
                for x in unknown(*pair, f"{where}[{i}]")]  # fmt: skip
    return [] if ours == theirs else [f"{where}: {ours} became {theirs}"]


def schema_errors(found: dict[str, Any]) -> list[str]:
    from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

    model = JobsetV1alpha2JobSet.from_dict(found)  # ValidationError: a wrong type
    assert model is not None
    errors = unknown(found, model.to_dict())
    # The models know no enumerations. These are of the JobSet CRD (v1alpha2,
    # config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml) and of batch/v1.
    failure = found["spec"]["failurePolicy"]
    allowed = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}
    errors += [r["action"] for r in failure["rules"] if r["action"] not in allowed]
    for rule in job(found)["podFailurePolicy"]["rules"]:
        if rule["action"] not in {"FailJob", "FailIndex", "Ignore", "Count"}:
            errors.append(rule["action"])
    return errors


@pytest.mark.parametrize(
    ("words", "hosts", "chips", "slices", "selector"),
    [
        ((*V5E, "--spot"), 4, 4, 1, {"accelerator": "tpu-v5-lite-podslice", "topology": "4x4"}),
        (("--accelerator_type=v6e-8",), 1, 8, 1, {"topology": "2x4"}),
        (
            ("--accelerator_type=v5p-16", "--topology=2x2x2", "--node_count=2"),
            *(2, 4, 2, {"accelerator": "tpu-v5p-slice", "topology": "2x2x2"}),
        ),
        (
            ("--accelerator_type=tpu7x-8", "--topology=2x2x1", "--reservation=mine"),
            *(1, 4, 1, {"accelerator": "tpu7x"}),
        ),
    ],
)
def test_jobset_is_valid_and_fits_the_slice(
    cloud: Cloud, words: tuple[str, ...], hosts: int, chips: int, slices: int, selector: Any
) -> None:
    found = manifest(cloud, *words)
    assert schema_errors(found) == []
    assert found["spec"]["replicatedJobs"][0]["replicas"] == slices
    assert job(found)["parallelism"] == job(found)["completions"] == hosts
    assert pod(found)["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
    nodes = pod(found)["nodeSelector"]
    for key, value in selector.items():
        assert nodes[f"cloud.google.com/gke-tpu-{key}"] == value
    assert ("cloud.google.com/gke-spot" in nodes) == ("--spot" in words)
    assert nodes.get("cloud.google.com/reservation-name") == (
        "mine" if "--reservation=mine" in words else None
    )


def test_the_schema_check_can_fail(cloud: Cloud) -> None:
    found = manifest(cloud, *V5E)
    pod(found)["nodeSelektor"] = {}
    assert schema_errors(found) == [
        ".spec.replicatedJobs[0].template.spec.template.spec.nodeSelektor"
    ]
    found = manifest(cloud, *V5E)
    found["spec"]["failurePolicy"]["rules"][0]["action"] = "Retry"
    assert schema_errors(found) == ["Retry"]


def test_exit_codes_in_kubernetes(cloud: Cloud) -> None:
    """2 and 3 end the JobSet; everything else, 75 and a preemption among it, begins anew."""
    found = manifest(cloud, *V5E, "--max_restarts", "7")
    rule = job(found)["podFailurePolicy"]["rules"][0]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2, 3])
    assert rule["onExitCodes"]["containerName"] == pod(found)["containers"][0]["name"]
    failure = found["spec"]["failurePolicy"]
    assert failure["maxRestarts"] == 7
    assert failure["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert job(found)["backoffLimit"] == 0
    assert pod(found)["restartPolicy"] == "Never"  # podFailurePolicy allows no other


def test_arguments_arrive_as_they_were_typed(cloud: Cloud) -> None:
    words = ("--template", 'a "b" \\n & $(id)', "@NAME@", "@ARGUMENTS@", "- x: y", "é", "")
    found = manifest(cloud, *V5E, train=("--", *words))
    assert pod(found)["containers"][0]["args"] == list(words)
    assert found["metadata"]["name"] == "tune"


def test_secrets_are_named_not_written(cloud: Cloud) -> None:
    found = manifest(cloud, *V5E, "--secret", "mine")
    for variable in pod(found)["containers"][0]["env"]:
        assert set(variable) == {"name", "valueFrom"}
        assert variable["valueFrom"]["secretKeyRef"]["name"] == "mine"


def test_kubectl_gets_the_manifest(cloud: Cloud) -> None:
    assert cloud.run(*GKE, *V5E, *TRAIN).returncode == 0
    assert kubectl(cloud) == ["get jobset tune", "apply -f -"]
    assert yaml.safe_load((cloud.folder / "stdin").read_text()) == manifest(cloud, *V5E)
    for question in ("kubectl", "jobsets"):
        cloud.answers(question, '!no matches for kind "JobSet"')
        done = cloud.run(*GKE, *V5E, *TRAIN)
        assert done.returncode == 2
        assert "Is JobSet installed" in done.stderr


def kubectl(cloud: Cloud) -> list[str]:
    return [" ".join(call.split()[1:4]) for call in cloud.calls]


@pytest.mark.parametrize("state", ["Completed", "Suspended Failed"])
def test_a_jobset_that_has_ended_is_made_anew(cloud: Cloud, state: str) -> None:
    cloud.answers("jobsets", f"tune {state} ")
    done = cloud.run(*GKE, *V5E, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert "tune has ended and is made anew" in done.stderr
    assert kubectl(cloud) == ["get jobset tune", "delete jobset tune", "apply -f -"]


@pytest.mark.parametrize("state", ["", "StartupPolicyCompleted "])
def test_a_jobset_that_has_not_ended_is_left(cloud: Cloud, state: str) -> None:
    cloud.answers("jobsets", f"tune {state}")
    done = cloud.run(*GKE, *V5E, *TRAIN)
    assert done.returncode == 2
    assert "tune is there and has not ended" in done.stderr
    assert kubectl(cloud) == ["get jobset tune"]


def test_a_pod_has_room_for_a_model(cloud: Cloud) -> None:
    found = manifest(cloud, *V5E)
    resources = pod(found)["containers"][0]["resources"]
    assert resources["requests"] == {"ephemeral-storage": "60Gi"}
    # the limit of the sidecar would be one for the pod
    annotations = job(found)["template"]["metadata"]["annotations"]
    assert annotations["gke-gcsfuse/ephemeral-storage-limit"] == "0"
    found = manifest(cloud, *V5E, "--disk_gib", "0")
    assert pod(found)["containers"][0]["resources"] == {"limits": {"google.com/tpu": 4}}
    assert schema_errors(found) == []


def test_every_slice_adds_restarts(cloud: Cloud) -> None:
    for words, restarts in [((), 20), (("--node_count", "3"), 60), (("--max_restarts", "7"), 7)]:
        assert manifest(cloud, *V5E, *words)["spec"]["failurePolicy"]["maxRestarts"] == restarts


def test_a_secret_among_the_arguments_is_refused(cloud: Cloud) -> None:
    done = cloud.run(*GKE, *V5E, "--print", *TRAIN, "hf_verysecret", HF_TOKEN="hf_verysecret")
    assert (done.returncode, done.stdout) == (2, "")
    assert "HF_TOKEN stands among the arguments" in done.stderr
    assert "--secret names the Secret" in done.stderr
    assert "hf_verysecret" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--accelerator_type=v5p-16",), "--topology is missing: v5p-16"),
        (("--accelerator_type=v5p-16", "--topology=2x2x1"), "has 4 chips; v5p-16 has 8"),
        (("--accelerator_type=v5e-12",), "v5e has 1, 4, 8, 16"),
        ((*V5E, "--chips_per_node=5"), "--chips_per_node 5 does not divide the 16 chips"),
        ((*V5E, "--spot", "--reservation=r"), "choose one"),
        ((*V5E, "--image", 'x"\ny: z'), "--image: missing, or with unusual characters"),
        ((*V5E, "--disk_gib", "much"), "--disk_gib: a whole number"),
        (("--accelerator_type=v6e-8", "--node_count=2"), "v6e-8 is a single VM"),
        (("--accelerator_type=v5p-8", "--topology=2x2x1", "--node_count=2"), "is a single VM"),
        ((*V5E, "--secret", "a b"), "--secret: missing, or with unusual"),
        (V5E, "what to train is missing"),
        ((*V5E, "--", "a\nb"), "an argument has a control character"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_what_gke_refuses(cloud: Cloud, words: tuple[str, ...], message: str) -> None:
    done = cloud.run(*GKE, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert cloud.calls == []


def test_skypilot_fields() -> None:
    """The fields that are used, by https://docs.skypilot.co/en/latest/reference/yaml-spec.html and
    sky/utils/schemas.py; SkyPilot itself is too large to install for this."""
    task = yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())
    top = {"name", "workdir", "resources", "envs", "secrets", "file_mounts", "setup", "run"}
    assert set(task) == top
    resources = task["resources"]
    assert set(resources) == {
        *("infra", "accelerators", "accelerator_args", "use_spot", "job_recovery")
    }
    assert set(resources["job_recovery"]) == {"max_restarts_on_errors", "recover_on_exit_codes"}
    assert resources["job_recovery"]["recover_on_exit_codes"] == [75]
    assert task["secrets"] == {"HF_TOKEN": None}  # null: asked for, never written here
    for step in ("setup", "run"):
        checked = subprocess.run(["bash", "-n", "-c", task[step]], capture_output=True, check=False)
        assert checked.returncode == 0, checked.stderr


def test_slurm_asks_for_one_process_a_gpu() -> None:
    lines = (SCRIPTS / "slurm.sh").read_text().splitlines()
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in lines
        if line.startswith("#SBATCH")
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert "gpus-per-task" not in options
    assert "requeue" in options
    assert options["signal"].startswith("TERM@")  # to the tasks, not to the batch shell
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert max(directives) < first  # sbatch reads none after the first command


def test_slurm_tasks_have_their_cores(cloud: Cloud) -> None:
    done = cloud.run("slurm.sh", "--dry_run", "--config", "c", PYTHON="p", SLURM_CPUS_PER_TASK="8")
    ran = "srun --kill-on-bad-exit=0 --cpus-per-task=8 p -m jaxtune.train --config c"
    assert done.stdout == f"+ {ran}\n"


@pytest.mark.parametrize("code", [0, 2, 75])
def test_slurm_puts_a_stopped_job_back(cloud: Cloud, code: int) -> None:
    for name in ("srun", "scontrol"):
        tool = cloud.path / name
        tool.write_text(
            f'#!/bin/bash\necho "{name} $*" >>"$CLOUD/calls"\n'
            + (f"exit {code}\n" if name == "srun" else "")
        )
        tool.chmod(0o755)
    done = cloud.run("slurm.sh", "--config", "a b.yaml", SLURM_JOB_ID="17", PYTHON="python")
    assert done.returncode == code
    ran = "srun --kill-on-bad-exit=0 python -m jaxtune.train --config a b.yaml"
    assert cloud.calls == [ran, *(["scontrol requeue 17"] if code == 75 else [])]


def test_dockerfile_is_linted_and_copies_what_the_build_needs() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = (ROOT / "Dockerfile").read_text()
    assert "\nARG EXTRA=tpu,gcs\n" in text  # as setup.sh installs: gs:// for data and output
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (.*)", text, re.M):
        for source in shlex.split(line)[:-1]:
            assert (ROOT / source).exists(), source
            assert f"!{source.split('/')[0]}" in ignored, source
    assert "HF_TOKEN" not in re.sub(r"^#.*", "", text, flags=re.M)
