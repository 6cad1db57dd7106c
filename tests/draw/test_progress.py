"""Progress says nothing of what is quick, and lines where there is no terminal."""

from __future__ import annotations

from typing import Any

from jaxtune.draw.progress import Tokenising


def test_what_is_quick_writes_nothing(capsys: Any) -> None:
    with Tokenising() as progress:
        progress("a.jsonl", 512)
    assert capsys.readouterr() == ("", "")


def test_what_takes_long_writes_a_line_now_and_then(capsys: Any) -> None:
    with Tokenising(after_seconds=0, every_seconds=0) as progress:
        progress("folder/a\x1b.jsonl", 0)
        progress("folder/a\x1b.jsonl", 1024)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "tokenising a\u241b.jsonl: 1,024 records, " in captured.err
