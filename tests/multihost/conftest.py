"""The material of the runs, and the run on one host that the others are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest
from multihost import runs


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_material(tmp_path_factory.mktemp("hosts") / "material")


@pytest.fixture(scope="session")
def alone(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted, one process with four devices."""
    return runs.undisturbed(material, tmp_path_factory.mktemp("alone") / "out", devices=4)
