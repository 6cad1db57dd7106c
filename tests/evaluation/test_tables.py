"""Scores and answers side by side, as text."""

from __future__ import annotations

import doctest

from jaxtune.evaluation import text as scores
from jaxtune.evaluation.text import answers_text, scores_text


def test_the_examples_in_the_docstrings() -> None:
    done = doctest.testmod(scores)
    assert done.attempted == 3
    assert done.failed == 0


def test_a_row_for_each_score_that_is_there() -> None:
    found = scores_text({"model": {"eval_loss": 0.51234, "eval_perplexity": None, "examples": 3}})
    assert [line.split() for line in found.splitlines()] == [
        ["model"], ["loss", "0.5123"], ["perplexity", "not", "finite"]
    ]  # fmt: skip


CHANGES = {
    "eval_loss": {"value": -0.5, "interval": [-0.75, -0.25], "clear": True},
    "exact_match": {"value": -0.25, "interval": [-0.5, -0.125], "clear": True},
    "stop_rate": {"value": 0.25, "interval": [-0.25, 0.5], "clear": False},
    "answer_tokens": {"value": 3.0, "interval": [1.0, 5.0], "clear": True},
    "length_ratio": {"value": -1e-9, "interval": [-0.5, 0.5], "clear": False},
    "repetition": {"value": 0.5, "interval": None, "clear": False},
}  # fmt: skip


def test_a_difference_is_called_one_only_where_it_is() -> None:
    base = dict.fromkeys(CHANGES, 1.0)
    tuned = {key: 1.0 + found["value"] for key, found in CHANGES.items()}
    found = scores_text({"base": base, "tuned": {**tuned, "difference": CHANGES}})
    assert [line.replace(" points", "").split()[-5:] for line in found.splitlines()[1:-2]] == [
        ["\u22120.5000", "better", "\u22120.7500", "to", "\u22120.2500"],
        ["\u221225.0", "worse", "\u221250.0", "to", "\u221212.5"],
        ["125.0%", "+25.0", "\u221225.0", "to", "+50.0"],
        ["+3.0", "more", "+1.0", "to", "+5.0"],
        ["1.00", "0.00", "\u22120.50", "to", "+0.50"],
        ["repetition", "100.0%", "150.0%", "+50.0"][-5:],
    ]  # fmt: skip


def test_all_that_an_evaluation_holds() -> None:
    row = {"eval_loss": 1.0, "exact_match": 0.5, "examples": 1234, "difference": CHANGES}
    judge = {
        "model": "j\x1b", "wins": 8, "ties": 1, "losses": 2, "inconsistent": 1, "failed": 3,
        "unparseable": 0, "win_rate": 0.75, "interval": [0.4, 0.9], "clear": False,
    }  # fmt: skip
    tuned = {
        **row, "by_dataset": {"a": row, "b": row}, "by_column": {"kind\n": {"x\x1b": row}},
        "general": row, "judge": judge,
        "harness": {"arc": {"acc": 0.25, "acc_stderr": 0.0125, "acc,x": 0.5, "acc_stderr,x": 0.1}},
    }  # fmt: skip
    found = scores_text({"base": {**tuned, "judge": None}, "tuned": tuned})
    assert "\x1b" not in found
    lines = [line.split() for line in found.splitlines()]
    assert lines[3][:5] == ["loss,", "general", "text", "1.0000", "1.0000"]
    assert ["by", "data", "set", "examples", "loss,", "base", "loss,", "tuned", "exact", "match,",
            "base", "exact", "match,", "tuned"] in lines  # fmt: skip
    assert ["b", "1,234", "1.0000", "1.0000", "better", "50.0%", "50.0%", "worse"] in lines
    assert "8 wins, 1 ties, 2 losses of tuned; the two orders disagreed on 1." in found
    assert "Without a verdict: 3 failed." in found
    assert "Win rate 75.0% (40.0 to 90.0%), not told apart from 50%." in found
    assert ["arc", "acc", "0.2500", "\u00b10.0125", "0.2500", "\u00b10.0125"] in lines
    assert ["arc", "acc,x", "0.5000", "\u00b10.1000", "0.5000", "\u00b10.1000"] in lines


def test_hostile_answers_are_shown_not_sent() -> None:
    found = answers_text("a\nb", "c", {"base": ("\x1b[2J" + "x" * 1000, False)})
    assert "\x1b" not in found
    question, _, answer = found.splitlines()
    assert question == "> a b"
    assert len(answer) < 200
    assert answer.endswith("... (did not stop)")
