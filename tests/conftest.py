"""Eight virtual CPU devices, compiled programs kept between tests and runs, loud skips."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny programs: compiling them well would take longer than running them badly.
for flag in ("xla_force_host_platform_device_count=8", "xla_backend_optimization_level=0"):
    flags = os.environ.get("XLA_FLAGS", "")
    if flag.partition("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{flag}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"

jax.config.update("jax_compilation_cache_dir", str(ROOT / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data and a real tokenizer beside the checkout; not part of the project."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED}: the checks against it did not run")
    return SHARED


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenised data of the tests stays out of the user's cache."""
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "jaxtune-cache"))
