"""Imports only go down: every import of every file, function-local ones too."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jaxtune

PACKAGE = Path(jaxtune.__file__).parent

# room -> the rooms it may import. A room may import itself; doors import every room, no door.
ROOMS: dict[str, set[str]] = {
    "methods": set(),
    "knobs": {"methods"},
    "aliases": {"methods"},
    "config": {"knobs", "aliases"},
    "spec": set(),
    "chips": {"config"},
    "compiled": set(),
    "command": {"config", "stores", "untrusted"},
    "tree": {"config"},
    "untrusted": {"config"},
    "kept": {"config"},
    "lock": {"config"},
    "files": set(),
    "rows": {"files"},
    "memory": {"config"},
    "stores": {"config", "untrusted", "kept"},
    "hub": {"config", "untrusted", "stores"},
    "mesh": {"config", "tree"},
    "collectives": {"mesh", "tree"},
    "data": {"config", "untrusted", "hub", "stores"},
    "draw": {"config"},
    "scoring": set(),
    "judge": {"config"},
    "ops": {"spec"},
    "model": {"config", "spec", "tree", "mesh", "collectives", "ops"},
    "hosts": {"config"},
    "watch": {"config", "command", "hosts", "memory"},
    "learn": {
        *("config", "hosts", "chips", "spec", "tree", "mesh", "collectives", "ops", "model"),
        *("stores", "kept", "lock", "files", "rows"),
    },
    "hf": {"config", "untrusted", "hub", "stores", "spec", "tree", "mesh", "model"},
    "weights": {
        *("config", "command", "spec", "tree", "mesh", "data", "model", "learn", "hf", "stores")
    },
    "assemble": {
        *("config", "stores", "chips", "data", "spec", "mesh", "model", "learn", "hf", "weights"),
    },
    "planning": {
        *(
            "config",
            "memory",
            "chips",
            "compiled",
            "assemble",
            "spec",
            "tree",
            "mesh",
            "data",
            "model",
        ),
        *("ops", "learn", "hf", "weights"),
    },
    "reporting": {"config", "command", "untrusted", "rows", "data", "draw"},
    "incident": {"files", "rows", "mesh", "data", "learn"},
    "beginning": {"config", "command", "tree", "data", "learn", "hf", "weights"},
    "rundir": {"config", "command", "hosts", "stores", "lock", "files", "learn"},
    "agreement": {"config", "hosts", "tree", "data", "hf", "weights"},
    "loop": {
        *("config", "command", "hosts", "watch", "chips", "tree", "mesh", "data", "draw", "learn"),
        "incident",
    },
    "samples": {
        *("config", "hosts", "rows", "tree", "mesh", "data", "model", "learn", "hf", "weights"),
        *("inference", "answering"),
    },
    "evaluating": {
        *("config", "command", "mesh", "data", "draw", "scoring", "judge", "model", "learn"),
        *("weights", "inference", "answering"),
    },
    "talk": {"config", "command", "data", "draw", "model", "inference", "answering"},
    "capacity": {"config", "command", "memory", "mesh", "model", "inference"},
    "serving": {
        "config",
        "command",
        "memory",
        "capacity",
        "data",
        "draw",
        "model",
        "inference",
        "answering",
        "weights",
    },
    "answering": {"config", "data", "model", "weights", "inference"},
    "inference": {
        *("config", "command", "spec", "tree", "mesh", "data", "model", "learn", "hf", "weights"),
        "stores",
    },
}
DOORS = {"train", "preview", "plan", "convert", "evaluate", "chat", "report"}
# room -> third-party packages it must not know.
BANNED = {
    "knobs": {"jax", "flax", "numpy", "transformers"},
    "aliases": {"jax", "flax", "numpy", "transformers"},
    "config": {"jax", "flax", "numpy", "transformers"},
    "methods": {"jax", "flax", "numpy", "transformers"},
    "command": {"jax", "flax", "numpy", "transformers"},
    "spec": {"jax", "flax", "numpy", "transformers"},
    "untrusted": {"jax", "flax", "numpy", "transformers"},
    "hub": {"jax", "flax", "numpy", "transformers", "torch"},
    "stores": {"jax", "flax", "numpy", "transformers", "torch"},
    "data": {"jax", "flax", "optax", "orbax", "torch"},
    "draw": {"jax", "flax", "torch"},
    "scoring": {"jax", "flax", "transformers", "torch"},
    "judge": {"jax", "flax", "numpy", "transformers", "torch"},
    "reporting": {"jax", "flax", "torch"},
    "talk": {"jax", "flax", "torch"},
    "serving": {"jax", "flax", "torch"},
    "ops": {"flax", "optax", "transformers", "torch"},
    "model": {"optax", "orbax", "transformers", "torch", "safetensors"},
    "learn": {"flax", "transformers", "tokenizers", "safetensors", "torch"},
    "hf": {"flax", "optax", "torch"},
    "mesh": {"flax", "torch"},
    "collectives": {"flax", "torch"},
    "tree": {"jax", "flax", "torch"},
    "files": {"jax", "flax", "numpy", "torch"},
    "rows": {"jax", "flax", "numpy", "torch"},
    "memory": {"jax", "flax", "numpy", "torch"},
}


def files() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "__main__.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(source: str) -> list[str]:
    """Full dotted names imported, `from a import b` as `a.b`."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.extend(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def violations(room: str, source: str) -> list[str]:
    allowed = set(ROOMS) if room in DOORS else ROOMS[room]
    found = []
    for name in imports(source):
        top, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if top == "jaxtune" and other not in allowed | {room, "__version__"}:
            found.append(f"{room} imports {name}")
        if top in BANNED.get(room, set()):
            found.append(f"{room} imports {name}")
        if name.startswith("flax.nnx"):
            found.append(f"{room} imports {name}")
    return found


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_go_down(path: Path) -> None:
    room = room_of(path)
    assert room in ROOMS or room in DOORS, f"a new room '{room}': give it a floor in this test"
    assert violations(room, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("data", "import jax.numpy as jnp"),
        ("ops", "def f():\n    from flax import linen"),
        ("model", "from jaxtune.learn import step"),
        ("hf", "import jaxtune.training.checkpoint.checkpoints"),
        ("train", "from jaxtune import evaluate"),
        ("config", "from jaxtune.tree import named"),
    ],
)
def test_the_check_itself_catches(room: str, line: str) -> None:
    assert violations(room, line)


@pytest.mark.parametrize("door", sorted(DOORS))
def test_help_is_light(door: str) -> None:
    """Every door's --help works, lists the knobs, and imports no jax."""
    code = (
        "import sys\n"
        f"from jaxtune import {door}\n"
        "try:\n"
        f"    {door}.main(['--help'])\n"
        "except SystemExit as error:\n"
        "    assert not error.code\n"
        "heavy = {'jax', 'transformers', 'flax'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("--learning_rate", "--mesh.fsdp", "--lora.r", "--per_device_train_batch_size"):
        assert name in done.stdout
