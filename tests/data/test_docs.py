"""The table of pitfalls names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def test_every_pitfall_has_a_test_that_exists() -> None:
    rows = dict(re.findall(r"^\| (P\d+) \|(.*)$", TABLE, re.M))
    assert list(rows) == [f"P{number}" for number in range(1, 37)]
    for pitfall, row in rows.items():
        named = re.findall(r"`(tests/\S+\.py)::(\w+)`", row)
        assert named or "does not apply" in row, pitfall
        for file, test in named:
            source = (ROOT / file).read_text(encoding="utf-8")
            assert re.search(rf"^def {test}\(", source, re.M), f"{pitfall}: {file} has no {test}"
