"""The storm in its short form; `python tests/faults/storm.py --help` is the long one."""

from __future__ import annotations

import pytest
from faults import storm


@pytest.mark.slow
@pytest.mark.xdist_group("multihost")
@pytest.mark.parametrize("each", [1, pytest.param(6, marks=pytest.mark.nightly)])
def test_a_storm(each: int, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {**dict.fromkeys(("kills", "sigterms", "corruptions", "full-disks"), each), "seed": 3}
    assert storm.main([word for k, v in asked.items() for word in (f"--{k}", str(v))]) == 0
    assert "every run ended as the undisturbed one" in capsys.readouterr().out
