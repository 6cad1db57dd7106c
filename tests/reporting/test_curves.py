"""What goes onto which chart; and the differences between two answers."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import pytest

from jaxtune.reporting.html.answers import difference, samples
from jaxtune.reporting.html.curves import charts, curves
from jaxtune.reporting.html.evaluation import evaluation_tables

ROOT = Path(__file__).resolve().parents[2]


def test_a_number_that_no_chart_names_has_its_own() -> None:
    rows = [{"kind": "train", "step": 1, "loss": 1.0, "data_wait": 0.5, "note": "x", "done": True}]
    found = {chart.title: chart.series for chart in charts(rows, [])}
    assert list(found) == ["Loss", "Data wait"]
    assert found["Data wait"][0].y == [0.5]


def test_many_rows_are_all_on_the_chart_and_thinned_in_the_table() -> None:
    rows = [{"kind": "train", "step": s, "loss": 1 / s} for s in range(1, 1001)]
    (chart,) = charts(rows, [])
    assert chart.series[0].x == list(range(1, 1001))
    made = curves(rows, [])
    assert "1,000 rows, every 5th and the last; metrics.jsonl has all" in made
    assert made.count("<tr>") == 1 + 201
    assert ">996<" in made
    assert ">1,000<" in made


@pytest.mark.parametrize(
    ("before", "after", "left", "right"),
    [
        ("a red fox", "a blue fox", "a <del>red</del> fox", "a <ins>blue</ins> fox"),
        ("same", "same", "same", "same"),
        ("", "new", "", "new"),
        ("all & gone", "quite other words", "all &amp; gone", "quite other words"),
        ("<b> x y", "<b> x", "&lt;b&gt; x<del> y</del>", "&lt;b&gt; x"),
    ],
)
def test_differences(before: str, after: str, left: str, right: str) -> None:
    assert difference(before, after) == (left, right)


LOOPS = [
    ("a " * 2000, "a b " * 1000),
    ("!" * 4000, "!?" * 2000),
    ("and " * 1000, "and the " * 500),
    ("0 " * 1000, "0 1 " * 500),
    ("I am a good man. " * 235, "I am a good dog and a man. " * 148),
    ("the the of " * 360, "the of of the " * 280),
]


@pytest.mark.parametrize(("before", "after"), LOOPS, ids=lambda text: text[:9])
def test_answers_that_loop_are_compared_within_a_bound(
    before: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are shown as they are; what both begin and end with is compared at no cost."""
    steps: list[int] = []
    whole = difflib.SequenceMatcher.find_longest_match

    def counted(self: Any, alo: int = 0, ahi: Any = None, *more: Any) -> Any:
        steps.append(sum(len(self.b2j.get(word, ())) for word in self.a[alo:ahi]))
        assert sum(steps) <= 1_000_000, "the work is not bounded"
        return whole(self, alo, ahi, *more)

    monkeypatch.setattr(difflib.SequenceMatcher, "find_longest_match", counted)
    left, right = difference(before, after)
    for text in (left, right):
        assert "<del>" not in text
        assert "<ins>" not in text
    steps.clear()
    half = before[:1990]
    assert difference(f"{half} yes {half}", f"{half} no {half}") == (
        f"{half} <del>yes</del> {half}",
        f"{half} <ins>no</ins> {half}",
    )


def test_long_answers_without_loops_are_compared() -> None:
    text = (ROOT / "README.md").read_text()[:3900]
    one_more = text.replace(" the ", " THE ")
    left, right = difference(text, one_more)
    assert left.count("<del>the</del>") == right.count("<ins>THE</ins>") == text.count(" the ") > 9


def test_samples_keep_the_first_and_the_last() -> None:
    rows = [
        {"step": s, "prompt": p, "response": f"{s}", "stopped": True}
        for s in range(1, 31)
        for p in ("p", "q")
    ]
    made = samples(rows)
    assert made.count("<article>") == 2
    assert made.count("<dt>") == 16
    assert made.count("step 1<") == made.count("step 30<") == 2


def test_scores_of_one_model_and_of_a_data_set_that_base_lacks() -> None:
    assert "difference" not in evaluation_tables("f", {"eval_loss": 1.0})
    parts = {"a": {"eval_loss": 1.0}, "b": {"eval_loss": 2.0}}
    found = {"eval_loss": 1.0, "by_dataset": parts, "base": {"eval_loss": None}}
    made = evaluation_tables("f", found)
    assert made.count("<table>") == 2
    assert "not finite" in made
    assert "\u2013" in made  # base has no loss there
