"""How XLA is asked to compile here, in the tests' own process and in those that they start."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".jax_cache"
# Tiny programs: compiling them well would take longer than running them badly.
FAST = ["xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):  # later XLA does not know this flag, and aborts
    FAST.append("xla_cpu_use_fusion_emitters=false")  # a third less time


def flags(devices: int) -> list[str]:
    """Without the dashes."""
    return [f"xla_force_host_platform_device_count={devices}", *FAST]


def environment(devices: int) -> dict[str, str]:
    """Of a process with so many devices, which keeps what it compiles."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(f"--{flag}" for flag in flags(devices)),
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
