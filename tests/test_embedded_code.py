"""Code that tests hand to other processes as text imports what there is."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

FROM = re.compile(r"^ *from (jaxtune[\w.]*) import ([\w ,]+)", re.MULTILINE)
PATCHED = re.compile(r"jaxtune(?:\.\w+){2,}")
FILES = sorted(Path(__file__).parent.rglob("*.py"))


def mentioned(source: str) -> Iterator[str]:
    """Yields the full dotted names that the string constants of a source import or patch."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for module, names in FROM.findall(node.value):
                for name in names.split(","):
                    yield f"{module}.{name.split(' as ')[0].strip()}"
            if PATCHED.fullmatch(node.value):
                yield node.value


def exists(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    try:
        if hasattr(importlib.import_module(module), attribute):
            return True
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True


def test_names_in_embedded_code_exist() -> None:
    files = [path for path in FILES if path != Path(__file__)]
    names = {(path.name, name) for path in files for name in mentioned(path.read_text())}
    assert len(names) > 20
    assert sorted((path, name) for path, name in names if not exists(name)) == []


@pytest.mark.parametrize(
    "line",
    ["from jaxtune import gone", "from jaxtune.cli import note, gone as there", "jaxtune.cli.gone"],
)
def test_the_check_itself_catches(line: str) -> None:
    assert not all(exists(name) for name in mentioned(f"code = {line!r}"))
