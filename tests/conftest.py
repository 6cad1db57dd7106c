"""Eight virtual CPU devices, compiled programs kept between tests and runs, loud skips."""

from __future__ import annotations

import gc
import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import children
import compat

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
for flag in children.flags(devices=8):
    given = os.environ.get("XLA_FLAGS", "")
    if flag.partition("=")[0] not in given:
        os.environ["XLA_FLAGS"] = f"{given} --{flag}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

from jaxtune.cli import ThisProcess  # noqa: E402

TESTS = Path(__file__).resolve().parent
SHARED = TESTS.parents[1] / "shared" / "data"

# What a shell starts in the background is deaf to Ctrl-C, with all that it starts; tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_compilation_cache_dir", str(children.CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_numpy_rank_promotion", "raise")


# Modules whose fixtures cost more than most of their tests: one worker makes them once.
ONE_WORKER = {
    "commands/test_adapters.py", "commands/test_part_of_a_model.py", "hf/test_adapter.py",
    "inference/test_decode_step.py", "inference/test_engine.py", "model/test_mixture_of_experts.py",
    "storage/test_remote_runs.py", "training/test_adapter_steps.py", "training/test_step.py",
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what compat.py names, before any is left out, and what one worker runs."""
    nodes = [f"{item.path.relative_to(TESTS).as_posix()}::{item.name}" for item in items]
    config.stash[compat.COLLECTED] = frozenset(nodes)
    for item, node in zip(items, nodes, strict=True):
        if compat.entries_of(node):
            item.add_marker("compat")
        if (file := node.partition("::")[0]) in ONE_WORKER:
            item.add_marker(pytest.mark.xdist_group(file))


def pytest_collection_finish() -> None:
    """Leaves modules and tests out of garbage collection, an eighth of the suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


# Of the 65,530 ranges of memory that Linux gives a process by default. Every compiled program takes
# some, and a compiler that gets no more crashes.
MOST_RANGES, LOOKED_EVERY = 25_000, 16  # tests
_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def _few_programs() -> Iterator[None]:
    """Drops what earlier tests compiled, before it is too much for the process."""
    yield
    ranges = Path("/proc/self/maps")
    if next(_tests) % LOOKED_EVERY or not ranges.exists():
        return
    if ranges.read_bytes().count(b"\n") > MOST_RANGES:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def _as_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows notes, which a call from Python does not."""
    monkeypatch.setattr(ThisProcess, "is_command", True)


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
