"""The fuzz in its short form, by hypothesis; `tests/faults/fuzz.py --help` is the long one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from faults import fuzz
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fuzz.make_good(tmp_path_factory.mktemp("good"))


@pytest.mark.parametrize("name", [*fuzz.KINDS])
@pytest.mark.parametrize("examples", [12, pytest.param(200, marks=pytest.mark.nightly)])
def test_spoilt_inputs_are_read_or_refused(
    name: str, examples: int, good: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("input")
    asked = settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    @asked
    @given(st.integers(0, 2**32))
    def look(seed: int) -> None:
        answer, said = fuzz.one(fuzz.KINDS[name], good, folder, random.Random(seed))
        assert answer != "finding", f"{name} {seed}: {said}"

    look()


def test_the_fuzz_itself_notices(good: Path, tmp_path: Path) -> None:
    """A traceback, a file outside, a hang, and a refusal."""

    def nothing(good: Path, folder: Path, dice: random.Random) -> None:
        pass

    def look(read: object) -> tuple[str, str]:
        kind = fuzz.Kind(1, nothing, read)  # type: ignore[arg-type]
        return fuzz.one(kind, good, tmp_path / "input", random.Random(0))

    def outside(folder: Path, good: Path, dice: random.Random) -> None:
        (folder.parent / "outside").write_text("x")

    def refuse(folder: Path, good: Path, dice: random.Random) -> None:
        from jaxtune.config import DataError

        raise DataError("train.jsonl:3: no.")

    def fail(folder: Path, good: Path, dice: random.Random) -> None:
        raise KeyError("x")

    assert look(outside)[0] == "finding"
    assert "written outside: ['open" in look(outside)[1]
    assert look(fail)[0] == "finding"
    assert look(refuse) == ("refused", "train.jsonl:3: no.")
    assert look(nothing) == ("read", "")


def test_an_input_that_never_ends_is_a_finding(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)

    def forever(folder: Path, good: Path, dice: random.Random) -> None:
        while True:
            pass

    kind = fuzz.Kind(1, lambda good, folder, dice: None, forever)
    answer, said = fuzz.one(kind, good, tmp_path / "input", random.Random(0))
    assert answer == "finding"
    assert "took longer" in said
