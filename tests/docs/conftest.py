"""A folder with a small model and data, from which pages and the notebook are run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from jaxtune.config import load
from jaxtune.train import run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pages' blocks start from; its model has one layer and learned one step."""
    folder = tmp_path_factory.mktemp("pages")
    source = folder / "source"
    shutil.copytree(ROOT / "configs" / "quickstart" / "model", source)
    config = json.loads((source / "config.json").read_text())
    config.update(num_hidden_layers=1, hidden_size=32, head_dim=8, max_position_embeddings=2048)
    (source / "config.json").write_text(json.dumps(config))
    rows = [
        {"prompt": f"Name number {number}.", "completion": f"It is {number}."}
        for number in range(24)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "examples.jsonl").write_text(lines)
    settings = {
        "model_name_or_path": str(source), "init": "random", "output_dir": str(folder / "OUT"),
        "dataset": str(folder / "examples.jsonl"), "max_steps": 1, "max_length": 64,
    }  # fmt: skip
    run(load(overrides=settings))
    for name in ("MODEL", "BASE"):
        shutil.copytree(folder / "OUT" / "hf", folder / name)
    return folder
