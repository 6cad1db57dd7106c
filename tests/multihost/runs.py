"""Runs of `train` as processes of their own: one or several hosts, on a model that is tiny."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from children import environment
from tiny import write_model

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("Paris", "Rome", "Oslo", "Cairo", "Lima", "Quito", "Delhi", "Seoul")
# What depends on the clock and the machine.
CLOCK = ("tokens_per_second", "mfu", "step_seconds", "data_wait", "memory_peak_bytes")


def make_material(folder: Path) -> Path:
    """train.jsonl, eval.jsonl and model/ (config and tokenizer, no weights) in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "instruction": f"Where is number {i}?",
            "output": f"In {PLACES[i % 8]}" + " today" * (i % 5),
        }
        for i in range(44)
    ]
    for name, part in (("train", rows[:40]), ("eval", rows[40:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text)
    write_model(folder / "model", kv_heads=2)
    return folder


def flags(material: Path, out: Path, **more: object) -> list[str]:
    """40 examples, 8 a step: 5 steps an epoch, 12 steps, evaluated and saved on the way."""
    values: dict[str, object] = {
        "model_name_or_path": material / "model", "init": "random",
        "dataset": material / "train.jsonl", "eval_datasets": material / "eval.jsonl",
        "output_dir": out, "max_length": 64, "global_batch_size": 8,
        "per_device_train_batch_size": 1, "max_steps": 12, "learning_rate": 1e-2, "save_steps": 4,
        "logging_steps": 1, "eval_steps": 6, "lr_scheduler_type": "cosine", "packing": "false",
        "gradient_checkpointing": "none", "per_device_eval_batch_size": 1,
        "dataset_num_proc": 1, **more,
    }  # fmt: skip
    return [
        word
        for name, value in values.items()
        if value is not None
        for word in (f"--{name}", str(value))
    ]


class Host:
    """One process; what it writes goes into a file, so that it never waits for a reader."""

    def __init__(self, argv: Sequence[str], *, devices: int, before: str = "", door: str = "train"):
        code = f"import sys\n{before}\nfrom jaxtune import {door} as door\n"
        code += "sys.exit(door.main(sys.argv[1:]))"
        env = {**environment(devices), "PYTHONPATH": str(ROOT)}
        self._out: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self._err: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *argv], stdout=self._out, stderr=self._err, env=env
        )

    def end(self, seconds: float = 240) -> int:
        """Its exit code; killed when it takes longer, which fails the caller's assert."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    @property
    def stdout(self) -> str:
        return _text(self._out)

    @property
    def stderr(self) -> str:
        return _text(self._err)


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def undisturbed(material: Path, out: Path, *, devices: int) -> Path:
    """The run by one process from beginning to end, in `out`."""
    host = Host(flags(material, out), devices=devices)
    assert host.end() == 0, host.stderr
    return out


def start(
    argv: Sequence[str], *, hosts: int, devices: int, before: str = "", door: str = "train"
) -> list[Host]:
    """`hosts` processes of one run, with `devices` in all. `before` is Python for each of them,
    run first, with HOST in it replaced by its number."""
    address = f"127.0.0.1:{free_port()}"
    return [
        Host(
            [
                *argv,
                *(("--hosts.coordinator_address", address, "--hosts.num_processes", str(hosts),
                   "--hosts.process_id", str(host)) if hosts > 1 else ()),
            ],
            devices=devices // hosts,
            before=before.replace("HOST", str(host)),
            door=door,
        )
        for host in range(hosts)
    ]  # fmt: skip


def rows_of(out: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]
