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
    out = tmp_path_factory.mktemp("alone") / "out"
    (host,) = runs.start(runs.flags(material, out), hosts=1, devices=4)
    assert host.end() == 0, host.stderr
    return out
