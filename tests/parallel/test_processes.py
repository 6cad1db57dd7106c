"""Who is looked for, and when: a laptop starts without asking anybody."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxtune.config import ConfigError, HostsConfig, load
from jaxtune.parallel import processes


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, False),  # salloc or sbatch, without srun
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]"}, True),
        ({"SLURM_NTASKS": "4", "OMPI_COMM_WORLD_SIZE": "2"}, True),  # mpirun in an allocation
        (
            {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "1"},
            False,  # srun -n 1 in a large job
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),  # GKE
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_a_cluster_is_seen_in_the_environment(
    environment: dict[str, str], found: bool, tmp_path: Path
) -> None:
    assert processes.detected(environment, tmp_path) is found


def test_alone_nothing_is_joined() -> None:
    processes.start(HostsConfig())
    processes.start(HostsConfig(num_processes=1))
    assert (processes.index(), processes.count(), processes.store()) == (0, 1, None)
    assert processes.gather_texts("x") == ["x"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator_address": "h:1", "num_processes": 2}, "hosts.process_id is not set"),
        ({"num_processes": 2}, "hosts.coordinator_address, hosts.process_id is not set"),
        (
            {"coordinator_address": "h:1", "num_processes": 2, "process_id": 2},
            "hosts.process_id: 2 of 2; expected 0 to 1",
        ),
    ],
)
def test_a_part_of_the_fields_is_refused(
    given: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "detected", lambda: False)
    with pytest.raises(ConfigError, match=message):
        processes.start(HostsConfig(**given))


def test_jax_s_own_variables_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "detected", lambda: False)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "h:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    with pytest.raises(ConfigError, match=r"hosts\.process_id is not set"):
        processes.start(HostsConfig())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hosts.coordinator_address", "10.0.0.2", "expected HOST:PORT"),
        ("hosts.heartbeat_timeout_seconds", 1, "greater than or equal to 5"),
        ("hosts.num_processes", 0, "greater than 0"),
        ("hang_timeout_seconds", -1, "greater than or equal to 0"),
        ("max_skipped_steps", -1, "greater than or equal to 0"),
        ("profile_steps", [5, 3], "first and last step; got 5 and 3"),
        ("early_stopping_patience", 2, "needs evaluations; set eval_split or eval_datasets"),
        ("sample_prompts", ["Hello"], "needs evaluations"),
        ("load_best_model_at_end", True, "needs evaluations; set eval_split or eval_datasets"),
    ],
)
def test_bad_values_are_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(overrides={name: value})


def test_the_names_of_jax_are_understood() -> None:
    config = load(overrides={"coordinator_address": "a:1", "num_processes": 2, "process_id": 1})
    assert config.hosts.model_dump(exclude_defaults=True) == {
        "coordinator_address": "a:1",
        "num_processes": 2,
        "process_id": 1,
    }
