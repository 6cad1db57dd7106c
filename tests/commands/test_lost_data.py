"""Commands on data that is lost: train, evaluate and plan refuse with advice, preview shows it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny

from jaxtune import evaluate, plan, preview, train

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLS = {
    "messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ]
}
PLAIN = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a b"}]}
LOST = "the template refuses the conversation: roles must go (system,) user, assistant, user, ...;"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.write_model(tmp_path / "model")
    for name, rows in (
        ("calls", [CALLS] * 3),
        ("mixed", [CALLS] * 3 + [PLAIN]),
        ("plain", [PLAIN]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def argv(folder: Path, *more: str) -> list[str]:
    return ["--model_name_or_path", str(folder / "model"), "--template", "alpaca", *more]


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (train.main, ["--dataset", "DATA", "--init", "random", "--output_dir", "out"]),
        (train.main, ["--dataset", "plain.jsonl", "--eval_datasets", "DATA", "--init", "random",
                      "--output_dir", "out"]),
        (evaluate.main, ["--dataset", "DATA"]),
        (plan.main, ["--dataset", "DATA", "--topology", "v5e-1", "--compile", "false"]),
    ],
    ids=["train", "train's evaluation set", "evaluate", "plan"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["calls.jsonl", "mixed.jsonl"])
def test_too_much_lost_is_refused(
    folder: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    main: Callable[[list[str]], int],
    flags: Sequence[str],
    name: str,
) -> None:
    monkeypatch.chdir(folder)
    assert main(argv(folder, *(name if flag == "DATA" else flag for flag in flags))) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    count = "nothing to train: all 3 rows are dropped"
    if name == "mixed.jsonl":
        count = "3 of 4 rows are dropped (75.0%), more than max_dropped (0.5)"
        assert message.endswith(
            "Or set max_dropped 0.75 to go on without them. `preview` shows every row."
        )
    assert f"{name}:1: {count}, 3 because: {LOST}" in message
    assert "Tried on 3 of them: template " in message
    assert " keeps 3" in message


def test_preview_shows_what_is_lost(folder: Path, capsys: Any) -> None:
    data = ("--dataset", str(folder / "calls.jsonl"))
    assert preview.main(argv(folder, *data)) == 0
    out = capsys.readouterr().out
    assert out.count(f"dropped: {LOST}") == 3
    assert "dataset calls: 100.0% of 3 rows dropped: 3 the template refuses" in out
    page = folder / "page.html"
    assert preview.main(argv(folder, *data, "--html", str(page), "--eval_split", "0.2")) == 0
    assert "100.0%" in page.read_text()
    capsys.readouterr()
    evaluated = ("--dataset", str(folder / "plain.jsonl"), "--eval_datasets", data[1])
    assert preview.main(argv(folder, *evaluated)) == 0
    out = capsys.readouterr().out
    assert "evaluation dataset calls: 100.0% of 3 rows dropped: 3 the template refuses" in out
    assert preview.main(argv(folder, *evaluated, "--stats", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["evaluation"]["by_dataset"]["calls"]["dropped_share"] == 1.0
    assert (found["by_dataset"]["plain"]["dropped"], found["evaluation"]["examples"]) == (0, 0)
