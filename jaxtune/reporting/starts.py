"""Starts of a run: where, on which devices and from which step it started or resumed.

Each is a line of OUT/starts.jsonl, so that a run which was stopped and resumed elsewhere says so.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path

from jaxtune import __version__

NAME = "starts.jsonl"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers")


def record_start(
    run_dir: Path,
    *,
    step: int,
    total_steps: int,
    rows_per_step: int,
    device: str,
    devices: int,
    hosts: int,
) -> None:
    """Add a line for a start; `device` is JAX's name of one, `devices` and `hosts` are those of
    the whole run."""
    row = {
        "step": step,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "total_steps": total_steps,
        "rows_per_step": rows_per_step,
        "device": device,
        "devices": devices,
        "hosts": hosts,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "jaxtune": __version__,
            "python": platform.python_version(),
            **{name: version for name in _PACKAGES if (version := _version(name))},
        },
    }
    with (run_dir / NAME).open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # a killed run may have left half a line
        file.write(json.dumps(row).encode("utf-8") + b"\n")


def _version(package: str) -> str | None:
    """The version of an installed package; training does not need all of them."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
