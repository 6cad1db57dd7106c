"""The storm in its short form; `python tests/faults/storm.py --help` is the long one."""

from __future__ import annotations

import pytest
from faults import storm


@pytest.mark.slow
@pytest.mark.xdist_group("multihost")
def test_a_short_storm(capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"kills": 1, "sigterms": 1, "corruptions": 1, "full-disks": 1, "seed": 3}
    assert storm.main([word for k, v in asked.items() for word in (f"--{k}", str(v))]) == 0
    assert "every run ended as the undisturbed one" in capsys.readouterr().out
