"""What a person reads: marks where tokens are trained, and nothing a terminal would obey."""

from __future__ import annotations

from jaxtune.draw.terminal import marked, printable

RUNS = [("Q: ", 0.0), ("Yes.</s>", 1.0), ("\n", 0.0), ("No.", 0.5)]


def test_marks_survive_a_pipe() -> None:
    assert marked(RUNS, color=False) == "Q: [[Yes.</s>]]\n[[No.]](x0.5)"


def test_colour_marks_the_same_pieces() -> None:
    assert "\033[32mYes.</s>\033[0m" in marked(RUNS, color=True)
    assert "\033[32mQ" not in marked(RUNS, color=True)


def test_escape_sequences_of_the_data_are_shown_not_sent() -> None:
    assert printable("a\x1b[2J\x07\x9b\tb\n") == "a␛[2J␇\ufffd\tb\n"


def test_direction_marks_of_the_data_are_shown_not_sent() -> None:
    """Otherwise `[[` and `]]` could be made to stand around other text than what is trained."""
    assert printable("a\u202eb\u2066c\u2069") == "a<U+202E>b<U+2066>c<U+2069>"
    assert printable("\u0639\u0631\u0628\u064a") == "\u0639\u0631\u0628\u064a"
    assert printable("\ud800") == "\ufffd"
