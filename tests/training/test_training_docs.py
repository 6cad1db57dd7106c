"""docs/training.md says what the code does: its tables are made anew and compared."""

from __future__ import annotations

from pathlib import Path

from scripts import load_script

from jaxtune.config import defaults

ROOT = Path(__file__).resolve().parents[2]
DOC = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def test_the_bytes_are_those_of_the_real_state() -> None:
    tables = load_script("benchmarks/optimisers.py")
    assert "\n".join(tables.per_parameter()) in DOC
    assert "\n".join(tables.by_part()) in DOC


def test_every_method_schedule_and_option_is_described() -> None:
    for name, method in defaults.METHODS.items():
        cells = [row.split("|")[2] for row in DOC.splitlines() if row.startswith(f"| {name} |")]
        rates = [float(rate) for rate in cells[-1].split(",")]
        assert rates == list(dict.fromkeys((method.full, method.lora)))
    for kind, options in defaults.SCHEDULES.items():
        row = next(line for line in DOC.splitlines() if line.startswith("|") and kind in line)
        assert [option for option in options if option not in row] == []
