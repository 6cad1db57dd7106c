"""Imports only go down: every import of every file, function-local ones too."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jaxtune

PACKAGE = Path(jaxtune.__file__).parent
COMMANDS = {"train", "preview", "plan", "evaluate", "chat", "report", "convert"}
# From the ground up. A package imports from lower floors only; siblings never import each other.
FLOORS: tuple[set[str], ...] = (
    {"config"},
    {"spec", "tree", "terminal"},
    {"storage", "html"},
    {"cli"},
    {"data"},
    {"ops", "parallel"},
    {"model"},
    {"hf"},
    {"training"},
    {"inference"},
    {"evaluation", "planning"},
    {"reporting", "server", "repl"},
    {"api"},
    COMMANDS,
)
FLOOR = {package: number for number, floor in enumerate(FLOORS) for package in floor}
# package -> third-party packages it must not know.
BANNED = {
    "config": {"jax", "flax", "numpy", "transformers", "torch"},
    "spec": {"jax", "flax", "numpy", "transformers", "torch"},
    "cli": {"jax", "flax", "numpy", "transformers", "torch"},
    "storage": {"jax", "flax", "numpy", "transformers", "torch"},
    "terminal": {"jax", "flax", "transformers", "torch"},
    "tree": {"jax", "flax", "torch"},
    "data": {"jax", "flax", "optax", "orbax", "torch"},
    "ops": {"flax", "optax", "transformers", "torch"},
    "parallel": {"flax", "torch"},
    "model": {"optax", "orbax", "transformers", "torch", "safetensors"},
    "training": {"flax", "transformers", "tokenizers", "safetensors", "torch"},
    "hf": {"flax", "optax", "torch"},
    "evaluation": {"flax", "torch"},
    "reporting": {"jax", "flax", "torch"},
    "repl": {"jax", "flax", "torch"},
    "server": {"jax", "flax", "torch"},
}


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str) -> list[str]:
    """Lists the full dotted names imported, `from a import b` as `a.b`."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.extend(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def violations(package: str, source: str) -> list[str]:
    allowed = {name for name, floor in FLOOR.items() if floor < FLOOR[package]}
    banned = BANNED.get(package, set())
    wrong = []
    for name in imports(source):
        top, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        upward = top == "jaxtune" and other not in allowed | {package, "__version__"}
        if upward or top in banned or name.startswith("flax.nnx"):
            wrong.append(f"{package} imports {name}")
    return wrong


def test_imports_only_go_down() -> None:
    files = [
        p
        for p in PACKAGE.rglob("*.py")
        if p not in (PACKAGE / "__init__.py", PACKAGE / "__main__.py")
    ]
    unplaced = {package_of(path) for path in files} - set(FLOOR)
    assert not unplaced, f"new packages {unplaced}: give them a floor in this test"
    wrong = {
        str(path.relative_to(PACKAGE)): names
        for path in files
        if (names := violations(package_of(path), path.read_text(encoding="utf-8")))
    }
    assert wrong == {}


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("data", "import jax.numpy as jnp"),
        ("ops", "def f():\n    from flax import linen"),
        ("model", "from jaxtune.training import step"),
        ("hf", "import jaxtune.training.checkpoint.checkpoints"),
        ("train", "from jaxtune import evaluate"),
        ("repl", "from jaxtune.server import app"),
        ("server", "from jaxtune.reporting.html import markup"),
        ("config", "from jaxtune.tree import named"),
    ],
)
def test_the_check_itself_catches(package: str, line: str) -> None:
    assert violations(package, line)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_is_light(command: str) -> None:
    """Runs every command's --help: it lists the config fields and imports no jax."""
    code = (
        "import sys\n"
        f"from jaxtune import {command}\n"
        "try:\n"
        f"    {command}.main(['--help'])\n"
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
