"""The code cells of notebooks/finetune.ipynb run in order, at tiny size on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = json.loads((ROOT / "notebooks" / "finetune.ipynb").read_text(encoding="utf-8"))
# Takes the place of the values in the cell tagged "parameters"; every name there has one.
TINY = {
    "MODEL": "MODEL", "OUTPUT": "tuned", "STEPS": 4, "MAX_LENGTH": 64, "ROWS_PER_DEVICE": 1,
    "LEARNING_RATE": 1e-2,
}  # fmt: skip


def _cells() -> list[tuple[str, list[str]]]:
    """(source, tags) of the code cells."""
    return [
        ("".join(cell["source"]), cell["metadata"].get("tags", []))
        for cell in NOTEBOOK["cells"]
        if cell["cell_type"] == "code"
    ]


def test_the_notebook_runs(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "MODEL").symlink_to(material / "MODEL", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "notebook"}
    for number, (source, tags) in enumerate(_cells()):
        if "install" in tags:
            assert source.startswith("%pip install"), "nothing else is left out"
            continue
        exec(compile(source, f"finetune.ipynb, code cell {number}", "exec"), namespace)
        if "parameters" in tags:
            assert set(TINY) <= set(namespace)
            namespace.update(TINY)
    assert namespace["result"].step == 4
    assert len(namespace["watch"].losses) > 0
    assert all(isinstance(answer["response"], str) for answer in namespace["answers"])
    assert len(namespace["answers"]) == 3
    assert (tmp_path / "tuned" / "hf" / "config.json").is_file()


def test_it_is_stored_without_outputs() -> None:
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert NOTEBOOK["nbformat"] == 4
