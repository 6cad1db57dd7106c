"""Compiling several settings beside each other, with processes that answer what they are told."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxtune.config import Config, ConfigError
from jaxtune.planning import search

Answers = Mapping[str, tuple[float, int, str]]  # settings -> seconds, exit code, what is printed


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answers], list[str]]:
    """Makes every plan a process that sleeps and prints; returns the settings that were asked."""

    def install(answers: Answers) -> list[str]:
        asked: list[str] = []

        def start(candidate: search.Candidate, *rest: Any) -> subprocess.Popen[str]:
            *_, folder, number = rest
            seconds, code, said = answers[candidate.settings]
            asked.append(candidate.settings)
            (folder / f"{number}.json").write_text(said)
            (folder / f"{number}.log").write_text(said)
            program = f"import sys, time; time.sleep({seconds}); sys.exit({code})"
            file = str(folder / f"{number}.yaml")
            return subprocess.Popen([sys.executable, "-c", program, "--config", file], text=True)

        monkeypatch.setattr(search, "_start", start)
        monkeypatch.setattr(search, "workers", lambda: 1)
        return asked

    return install


def candidate(
    settings: str, rows: int, family: str = "full", *, seconds: float = 1.0, needed: int = 1
) -> search.Candidate:
    return search.Candidate(settings, {}, needed, seconds, 1, rows, (family,))


def answer(fits: bool = True, *, seconds: float = 1.0, size: int = 1) -> str:
    return json.dumps({"fits": fits, "step_seconds": seconds, "hbm_bytes": size})


def tried(
    ranked: list[search.Candidate], minutes: float = 1.0, limit: int | None = None
) -> tuple[list[tuple[str, bool]], list[search.Progress], list[str]]:
    told: list[search.Progress] = []
    notes: list[str] = []
    there = SimpleNamespace(limit=limit, per_chip=1, slice=SimpleNamespace(name="v5e-8"))
    found = search.compile_all(
        ranked, Config(), SimpleNamespace(), there,  # type: ignore[arg-type]
        minutes=minutes, advance=told.append, note=notes.append,
    )  # fmt: skip
    result = [(each.settings, plan["fits"]) for each, plan in found]
    assert all(each.done <= each.total for each in told)
    return result, told, notes


def test_more_rows_than_what_did_not_fit_are_not_tried(
    answering: Callable[[Answers], list[str]],
) -> None:
    no, yes = answer(False), answer()
    asked = answering({
        "8 rows": (0, 0, no), "16 rows": (0, 0, no), "4 rows": (0, 0, yes), "dots": (0, 0, yes),
    })  # fmt: skip
    ranked = [candidate("8 rows", 8), candidate("16 rows", 16), candidate("4 rows", 4)]
    found, told, _ = tried([*ranked, candidate("dots", 16, "dots")])
    assert found == [("8 rows", False), ("4 rows", True), ("dots", True)]
    assert asked == ["8 rows", "4 rows", "dots"]
    assert (told[-1].done, told[-1].total, told[-1].settings) == (3, 3, "4 rows")


def test_what_the_compiler_said_reorders_what_is_left(
    answering: Callable[[Answers], list[str]],
) -> None:
    """Of `dots` the arithmetic is too kind by half: its next one is no longer the most promising,
    and once the fastest is known, not worth compiling."""
    asked = answering({
        "dots 1": (0, 0, answer(seconds=1.8)), "full 1": (0, 0, answer(seconds=1.3)),
        "full 2": (0, 0, answer(seconds=1.35)), "full 8": (0, 0, answer(seconds=1.2)),
    })  # fmt: skip
    ranked = [
        candidate("dots 1", 1, "dots", seconds=1.0), candidate("dots 2", 2, "dots", seconds=1.1),
        candidate("full 1", 1, seconds=1.3), candidate("full 2", 2, seconds=1.35),
        candidate("full 8", 8, seconds=1.5),
    ]  # fmt: skip
    found, _, _ = tried(ranked)
    assert asked == ["dots 1", "full 1", "full 2"]
    assert [fits for _, fits in found] == [True, True, True]


def test_what_its_like_has_shown_to_be_too_large_is_not_tried(
    answering: Callable[[Answers], list[str]],
) -> None:
    asked = answering({"1 row": (0, 0, answer(size=80)), "2 rows": (0, 0, answer(False))})
    ranked = [candidate("1 row", 1, needed=50), candidate("2 rows", 2, needed=75)]
    assert tried(ranked, limit=100)[0] == [("1 row", True)]
    assert asked == ["1 row"], "the other is expected to need 120"


def test_when_the_time_is_up_it_stops_with_what_it_has(
    answering: Callable[[Answers], list[str]],
) -> None:
    answering({"quick": (0, 0, answer()), "slow": (60, 0, "")})
    began = time.monotonic()
    found, _, _ = tried([candidate("quick", 1), candidate("slow", 2)], minutes=8 / 60)
    assert found == [("quick", True)]
    assert time.monotonic() - began < 45, "the slow one was ended, not waited for"


def test_a_plan_that_fails_is_left_out_with_its_last_line(
    answering: Callable[[Answers], list[str]],
) -> None:
    said = "note\njaxtune plan: mesh: 8 devices cannot be that."
    answering({"bad": (0, 2, said), "good": (0, 0, answer())})
    found, _, notes = tried([candidate("bad", 1), candidate("good", 1)])
    assert found == [("good", True)]
    assert notes == ["search: bad: jaxtune plan: mesh: 8 devices cannot be that."]
    with pytest.raises(ConfigError, match=r"search: bad: jaxtune plan: mesh: 8 devices"):
        tried([candidate("bad", 1)])


def test_what_a_process_is_asked_is_the_candidate(tmp_path: Path) -> None:
    from jaxtune.config import load

    config = load(overrides={
        "model_name_or_path": "MODEL", "dataset": "train.jsonl", "eval_split": 0.1,
    })  # fmt: skip
    subject = SimpleNamespace(length=512, steps=77, model=SimpleNamespace(folder=tmp_path / "m"))
    chosen = candidate("--mesh.fsdp 4", 2)._replace(
        fields={"mesh.fsdp": 4, "mesh.data": 2, "global_batch_size": 16}
    )
    process = search._start(chosen, config, subject, "v5e-8", tmp_path, 3)  # type: ignore[arg-type]
    process.kill()
    process.wait()
    asked = load(tmp_path / "3.yaml")
    assert (asked.mesh.fsdp, asked.mesh.data, asked.global_batch_size) == (4, 2, 16)
    assert (asked.max_length, asked.max_steps, asked.datasets) == (512, 77, ())
    assert asked.model_name_or_path == str(tmp_path / "m")
    assert "v5e-8" in process.args
