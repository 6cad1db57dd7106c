"""The conversation on a real terminal: line editing, Ctrl-C, and nothing that steers it."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import jaxtune

HERE = str(Path(jaxtune.__file__).parents[1])
SLOW = Path(__file__).with_name("slow.py")


class Terminal:
    def __init__(self, *argv: str) -> None:
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *argv],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env={**os.environ, "TERM": "xterm", "INPUTRC": "/dev/null", "PYTHONPATH": HERE},
        )  # fmt: skip
        os.close(theirs)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def enter(self, text: str) -> None:
        """Types once a line is asked for: before, the terminal itself would read the keys."""
        self.until("> ")
        self.type(text)

    def until(self, text: str, seconds: float = 60) -> str:
        """What was shown from the last such call up to `text`."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            more = self._more(end - time.monotonic())
            assert more, f"'{text}' did not come; there is:\n{self.shown}"
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def ctrl_c(self, until: str) -> None:
        """While a line is typed, and once more if nothing comes of it, as one would: between two
        of readline's waits Python hears the first only with the next key."""
        for _ in range(6):
            self.type("\x03")
            while until not in self.shown and self._more(10):
                pass
            if until in self.shown:
                break
        self.until(until, 0)

    def left(self) -> int:
        self.until("left")
        return self.process.wait(timeout=60)

    def _more(self, seconds: float) -> bool:
        ready, _, _ = select.select([self.ours], [], [], max(0, seconds))
        try:
            got = os.read(self.ours, 65536) if ready else b""
        except OSError:  # the other side is closed
            got = b""
        self.shown += got.decode("utf-8", "replace")
        return bool(got)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def start(*argv: str) -> Terminal:
        made.append(Terminal(*argv))
        return made[-1]

    yield start
    for each in made:
        each.process.kill()
        each.process.wait()
        os.close(each.ours)


def test_a_conversation(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    here = terminal(str(SLOW))
    here.enter("hello\r")
    assert "hello (1 messages)" in here.until("messages)")
    here.enter("one\\\rtwo\r")
    assert "one\r\ntwo (3 messages)" in here.until("messages)")
    here.enter('"""\r/quit\r"""\r')
    assert "/quit (5 messages)" in here.until("messages)")
    here.enter("/undoo\r")
    assert "no command '/undoo'. Did you mean '/undo'?" in here.until("typed //.")
    here.enter("/und\t\r")  # completed
    assert "2 before it stay" in here.until("stay")
    here.enter("hello\x1b[D\x1b[D\x7fL\r")  # two to the left, the letter before is gone
    assert "heLlo (5 messages)" in here.until("messages)")
    here.enter("\x1b[A\r")  # the line before
    assert "heLlo (7 messages)" in here.until("messages)")
    here.enter("\x04")
    assert here.left() == 0
    assert not list(tmp_path.iterdir())


def test_what_a_model_says_does_not_steer(terminal: Callable[..., Terminal]) -> None:
    here = terminal(str(SLOW))
    here.enter("steer\r")
    shown = here.until("messages)")
    assert "\u241b[2J\u241b]0;mine\u2407\u240dgone<U+202E>\ufffd31m" in shown
    assert "\x1b[2J" not in shown
    assert "\x1b]" not in shown
    assert "\x9b" not in shown
    here.enter("/quit\r")
    assert here.left() == 0


def test_ctrl_c_ends_an_answer_and_twice_leaves(terminal: Callable[..., Terminal]) -> None:
    here = terminal(str(SLOW))
    here.enter("a_" * 500 + "\r")
    here.until("aaaa")
    here.type("\x03")
    assert "messages)" not in here.until("Ctrl-C once more leaves")
    here.enter("next\r")  # it goes on, and remembers what was said until then
    assert "next (3 messages)" in here.until("messages)")
    here.enter("half a line")
    here.until("half a line")
    here.ctrl_c(until="Ctrl-C once more leaves")
    here.enter("whole\r")
    assert "whole (5 messages)" in here.until("messages)")
    here.until("> ")
    here.ctrl_c(until="Ctrl-C once more leaves")
    here.until("> ")
    here.ctrl_c(until="left")
    assert here.process.wait(timeout=60) == 0


def test_ctrl_c_just_when_an_answer_ends_loses_nothing(terminal: Callable[..., Terminal]) -> None:
    here = terminal(str(SLOW))
    here.enter("one\r")
    here.until("messages)")
    here.type("\x03")
    time.sleep(0.5)
    here.type("\r")  # at the latest now it is heard
    here.until("Ctrl-C once more leaves")
    here.enter("two\r")
    assert "two (3 messages)" in here.until("messages)")
    here.enter("/quit\r")
    assert here.left() == 0


def test_ctrl_c_twice_in_an_answer_leaves(terminal: Callable[..., Terminal]) -> None:
    here = terminal(str(SLOW))
    here.enter("b_" * 500 + "\r")
    here.until("bbbb")
    here.type("\x03")
    here.until("Ctrl-C once more leaves")
    here.until("> ")
    here.ctrl_c(until="left")
    assert here.process.wait(timeout=60) == 0


def test_a_history_file_when_asked_for(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    file = tmp_path / "history"
    here = terminal(str(SLOW), str(file))
    here.enter("remember me\r")
    here.until("messages)")
    here.enter("\x04")
    assert here.left() == 0
    assert "remember me" in file.read_text()
    here = terminal(str(SLOW), str(file))
    here.enter("\x1b[A\r")
    assert "remember me (1 messages)" in here.until("messages)")
