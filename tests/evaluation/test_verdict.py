"""What a judge is asked and how its reply is read."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from jaxtune.config import ConfigError
from jaxtune.evaluation.judge import verdict
from jaxtune.evaluation.judge.client import RequestFailed
from jaxtune.evaluation.judge.pairwise import Outcome, outcome
from jaxtune.evaluation.judge.verdict import filled, parse, rubric


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(verdict) == (0, 1)


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("VERDICT: A", "A"),
        ("Because.\n\n**VERDICT: B**\n\n", "B"),
        ("`VERDICT: TIE`", "TIE"),
        ("verdict: A", None),
        ("VERDICT: A.", None),
        ("VERDICT: C", None),
        ("VERDICT: A or VERDICT: B", None),
        ("VERDICT: A\nVERDICT: B", None),  # two
        ("VERDICT: A\nVERDICT: A", None),
        ("VERDICT: A\nNo, wait.", None),  # taken back
        ("I would say A", None),
        ("A", None),
        ("", None),
        ("VERDICT:\nA", None),
    ],
)
def test_a_verdict_is_never_guessed(reply: str, found: str | None) -> None:
    assert parse(reply) == found


@pytest.mark.parametrize(
    ("first", "swapped", "points", "agreed"),
    [
        ("B", "A", 1.0, True),
        ("A", "B", 0.0, True),
        ("TIE", "TIE", 0.5, True),
        ("A", "A", 0.5, False),
        ("B", "B", 0.5, False),
        ("B", "TIE", 0.5, False),
        ("TIE", "B", 0.5, False),
    ],
)
def test_both_orders(first: str, swapped: str, points: float, agreed: bool) -> None:
    assert outcome(first, swapped) == Outcome(points, agreed)  # type: ignore[arg-type]


def test_a_pair_without_a_verdict() -> None:
    assert outcome("A", None) == Outcome(None, why="unparseable")
    assert outcome(None, RequestFailed("gone")) == Outcome(None, why="gone")


def test_texts_are_put_in_once() -> None:
    """A text that holds a field's name stays as it is."""
    made = filled(
        "{question}|{reference}|{answer_a}|{answer_b}|{x}",
        question="{answer_a}", reference="{", answer_a="{answer_b}", answer_b="b",
    )  # fmt: skip
    assert made == "{answer_a}|{|{answer_b}|b|{x}"


def test_a_rubric_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "rubric.txt"
    own.write_text("{question} {answer_a} {answer_b}")
    assert rubric(str(own)) == "{question} {answer_a} {answer_b}"
    assert {"{question}", "{reference}", "{answer_a}", "{answer_b}"} <= set(rubric(None).split())
    own.write_text("{question} {answer_a}")
    with pytest.raises(ConfigError, match=r"has no \{answer_b\}, where those texts are to stand"):
        rubric(str(own))
    own.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read: not UTF-8 text"):
        rubric(str(own))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        rubric(str(tmp_path / "gone"))
