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


def candidate(settings: str, rows: int, family: str = "full") -> search.Candidate:
    return search.Candidate(settings, {}, 0, 1.0, 1, rows, (family,))


def tried(ranked: list[search.Candidate], minutes: float = 1.0) -> list[tuple[str, bool]]:
    told: list[tuple[int, int]] = []
    found = search.compile_all(
        ranked, Config(), SimpleNamespace(), "v5e-8", minutes=minutes,  # type: ignore[arg-type]
        advance=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    result = [(each.settings, plan["fits"]) for each, plan in found]
    assert all(done <= total for done, total in told)
    return result


def test_more_rows_than_what_did_not_fit_are_not_tried(
    answering: Callable[[Answers], list[str]],
) -> None:
    no, yes = json.dumps({"fits": False}), json.dumps({"fits": True})
    asked = answering({
        "8 rows": (0, 0, no), "16 rows": (0, 0, no), "4 rows": (0, 0, yes), "dots": (0, 0, yes),
    })  # fmt: skip
    ranked = [candidate("8 rows", 8), candidate("16 rows", 16), candidate("4 rows", 4)]
    assert tried([*ranked, candidate("dots", 16, "dots")]) == [
        ("8 rows", False), ("4 rows", True), ("dots", True),
    ]  # fmt: skip
    assert asked == ["8 rows", "4 rows", "dots"]


def test_when_the_time_is_up_it_stops_with_what_it_has(
    answering: Callable[[Answers], list[str]],
) -> None:
    answering({"quick": (0, 0, json.dumps({"fits": True})), "slow": (60, 0, "")})
    began = time.monotonic()
    found = tried([candidate("quick", 1), candidate("slow", 2)], minutes=4 / 60)
    assert found == [("quick", True)]
    assert time.monotonic() - began < 30, "the slow one was ended, not waited for"


def test_a_plan_that_fails_is_an_error_with_its_last_line(
    answering: Callable[[Answers], list[str]],
) -> None:
    answering({"bad": (0, 2, "note\njaxtune plan: mesh: 8 devices cannot be that.")})
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
