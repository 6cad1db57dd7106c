"""Scores and answers side by side, as text."""

from __future__ import annotations

import doctest

from jaxtune.draw import scores
from jaxtune.draw.scores import answers_text, scores_text


def test_the_examples_in_the_docstrings() -> None:
    done = doctest.testmod(scores)
    assert done.attempted == 2
    assert done.failed == 0


def test_a_row_for_each_score_that_is_there() -> None:
    found = scores_text({"model": {"eval_loss": 0.51234, "eval_perplexity": None, "examples": 3}})
    assert [line.split() for line in found.splitlines()] == [
        ["model"], ["loss", "0.5123"], ["perplexity", "not", "finite"]
    ]  # fmt: skip


def test_hostile_answers_are_shown_not_sent() -> None:
    found = answers_text("a\nb", "c", {"base": ("\x1b[2J" + "x" * 1000, False)})
    assert "\x1b" not in found
    question, _, answer = found.splitlines()
    assert question == "> a b"
    assert len(answer) < 200
    assert answer.endswith("... (did not stop)")
