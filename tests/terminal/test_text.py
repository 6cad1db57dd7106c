"""What a person reads: marks where tokens are trained, and nothing a terminal would obey."""

from __future__ import annotations

from typing import Any

from jaxtune.terminal.text import aligned, marked, printable, report_text

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


REPORT: dict[str, Any] = {
    "notes": [], "records": 10, "examples": 9, "tokens_total": 2000, "tokens_trained": 500,
    "trained_share": 0.25, "lengths": {"p50": 200, "p90": 300, "p99": 301, "max": 1302},
    "trained_lengths": {}, "by_dataset": {}, "stop_trained_share": 0.75,
    "flags": {"short_answers": "rows with an answer of one word", "truncated": "rows cut"},
    "short_answers": 2, "truncated": 0,
    "mixture": [
        {"dataset": "desk", "value": "shipping", "examples": 3, "share_before": 0.5,
         "per_epoch": 8, "share_after": 0.8}
    ],
    "columns": {"kind": {"a\x1b": {"records": 9, "examples": 9}}},
    "evaluation": {"examples": 4, "also_trained": 1, "nearly_trained": 2},
    "packing": {"rows": 7, "row_length": 2048, "fill": 0.987, "batch_size": 2,
                "steps_per_epoch": 4, "total_steps": 12},
    "dropped_by_reason": {
        "empty answer": {"count": 2, "first": [{"where": "f:1", "detail": "x"},
                                               {"where": "f:2", "detail": ""}]}
    },
}  # fmt: skip


def test_a_table_is_plain_text_of_any_width() -> None:
    rows = [("", "n", "note"), ("\u65e5\u672c\u8a9e", "1,000"), ("[b]a", "1", "x" * 300)]
    assert aligned(rows, numbers=range(1, 2)).splitlines() == [
        "  " + " " * 15 + "      n  note",
        "  \u65e5\u672c\u8a9e" + " " * 9 + "  1,000",  # letters of two columns each
        "  [b]a" + " " * 11 + "      1  " + "x" * 300,
    ]
    assert aligned([("1", "2"), ("30", "x")], numbers=range(1)) == "   1  2\n  30  x"


def test_the_report_says_what_is_remarkable() -> None:
    lines = report_text(REPORT).splitlines()
    for line in (
        "  10 records -> 9 examples, 2,000 tokens, 500 trained (25.0%)",
        "  per example      200  300  301  1,302",
        "  desk, shipping: 50.0% of the examples, 80.0% of an epoch (8 drawn of 3)",
        "    a\u241b: 9 examples (100.0%)",
        "  7 rows of 2,048 tokens, 98.7% full: 4 steps an epoch with 2 rows a step, 12 in all",
        "  evaluation: 4 examples, 1 also trained, 2 records nearly so",
        "  75.0% of the rows teach where to stop",
        "  2 rows with an answer of one word",
        "  dropped 2: empty answer",
        "    f:2",
    ):
        assert line in lines
    assert "rows cut" not in "".join(lines)
    assert len(report_text(REPORT, short=True).splitlines()) == len(lines) - 1
