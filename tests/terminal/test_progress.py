"""Progress says nothing of what is quick, and lines where there is no terminal."""

from __future__ import annotations

from typing import Any

from jaxtune.terminal.progress import SearchProgress, TokenizeProgress


def test_what_is_quick_writes_nothing(capsys: Any) -> None:
    with TokenizeProgress() as progress:
        progress("a.jsonl", 512)
    assert capsys.readouterr() == ("", "")


def test_what_takes_long_writes_a_line_now_and_then(capsys: Any) -> None:
    with TokenizeProgress(after_seconds=0, every_seconds=0) as progress:
        progress("folder/a\x1b.jsonl", 0)
        progress("folder/a\x1b.jsonl", 1024)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "tokenising a\u241b.jsonl: 1,024 records, " in captured.err


def test_a_search_says_a_line_for_every_answer(capsys: Any) -> None:
    with SearchProgress(20) as told:
        told(0, 9, "")
        told(1, 8, "")
        told(1, 7, "")
        told(2, 5, "2,400 tokens/s in 9.10 GiB: --mesh.fsdp 4")
    assert capsys.readouterr().err.splitlines() == [
        "search: 0 of 20 min, 1 of 8 settings",
        "search: 0 of 20 min, 2 of 5 settings; fastest 2,400 tokens/s in 9.10 GiB: --mesh.fsdp 4",
    ]
