"""Scores against the packages that define them, and by hand."""

from __future__ import annotations

import doctest
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from jaxtune.evaluation.scores import answers, reasoning
from jaxtune.evaluation.scores import score as measure
from jaxtune.evaluation.scores.answers import AnswerPair, answer_scores, repetition
from jaxtune.evaluation.scores.refusals import PHRASINGS, refuses
from jaxtune.evaluation.scores.text_overlap import bleu, chrf, rouge_l

WORDS = ["the", "a", "laptop", "can", "be", "sent", "back", "30", ",", ".", "Gr\u00fc\u00dfe"]


def texts(seed: int, count: int = 40) -> tuple[list[str], list[str]]:
    """References, and answers that share from none to all of their words; some are empty."""
    rng = np.random.default_rng(seed)
    references = [" ".join(rng.choice(WORDS, rng.integers(1, 15))) for _ in range(count)]
    said = []
    for text in references:
        words = text.split()
        kept = [w if rng.random() < rng.random() else rng.choice(WORDS) for w in words]
        said.append(" ".join(kept[: rng.integers(0, len(kept) + 1)]))
    return references, [references[0], "", *said[2:]]


@pytest.mark.parametrize(("module", "count"), [(answers, 2), (reasoning, 2)])
def test_the_examples_in_the_docstrings(module, count: int) -> None:  # type: ignore[no-untyped-def]
    assert doctest.testmod(module) == (0, count)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [1, 3, 40])
def test_of_any_group_of_answers_the_package_says_the_same(seed: int, size: int) -> None:
    references, said = texts(seed)
    chosen = np.random.default_rng(seed).integers(0, len(said), size)  # as a resample draws them
    here, there = [references[i] for i in chosen], [said[i] for i in chosen]
    for made, package in ((bleu, BLEU(force=True)), (chrf, CHRF())):
        theirs = package.corpus_score(there, [here]).score
        assert made(references, said).take(chosen).point() == pytest.approx(theirs, abs=1e-9)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(here, there, strict=True)
    theirs = np.mean([scorer.score(a, b)["rougeL"].fmeasure for a, b in pairs])
    assert rouge_l(references, said).take(chosen).point() == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("made", [bleu, chrf])
def test_of_many_groups_at_once(made) -> None:  # type: ignore[no-untyped-def]
    references, said = texts(5)
    score = made(references, said)
    groups = [score.take(np.arange(i, 40, 3)) for i in range(3)]
    at_once = score.value(np.stack([group.parts.sum(axis=0) for group in groups]))
    np.testing.assert_allclose(at_once, [group.point() for group in groups], atol=1e-12)
    assert len(set(at_once)) == 3


def test_answers_of_other_scripts_are_seen_by_letters() -> None:
    assert chrf(["\u4eca\u5929\u5929\u6c14"], ["\u4eca\u5929\u5929\u6c14"]).point() == 100.0
    assert rouge_l(["\u4eca\u5929"], ["\u4eca\u5929"]).point() == 0.0


@pytest.mark.parametrize(
    ("reference", "answer", "exact", "rouge"),
    [
        ("a b c d", "a b c d", 1.0, 1.0),
        ("a b c d", " a b c d\n", 1.0, 1.0),
        ("a b c d", "a c", 0.0, 2 / 3),  # precision 1, recall 1/2
        ("a b c d", "d c b a", 0.0, 1 / 4),
        ("a b c d", "x", 0.0, 0.0),
        ("a b c d", "", 0.0, 0.0),
    ],
)
def test_comparison(reference: str, answer: str, exact: float, rouge: float) -> None:
    said = [
        AnswerPair(reference, answer, True, reference, answer, 1),
        AnswerPair("q", "q", True, "q", "q", 1),
    ]
    found = answer_scores(said)
    assert found["exact_match"].point() == (exact + 1) / 2
    assert found["rougeL"].point() == pytest.approx((rouge + 1) / 2)


@pytest.mark.parametrize(
    ("reference", "answer", "compared"),
    [
        ("<think>\n\n</think>\n\nParis.", "<think>\nFrance?\n</think>\n\nParis.", "Paris."),
        ("<think>\n\n</think>\n\nParis.", "Paris.", "Paris."),
        ("Paris.", "<think>a</think><think>b</think> Paris.", "Paris."),
        ("Paris.", "<think>\nParis. Paris.", ""),
        ("Paris.", " \n<think>a</think>\n<think>Paris.", ""),
        ("The tag is <think>.", "The tag is <think>.", "The tag is <think>."),
        ("Hm.\n</think>\n\nParis.", "What?\n</think>\n\nParis.", "Paris."),
        ("Hm.\n</think>\n\nParis.", "Paris, or is it not", ""),  # begun by the prompt
        ("Hm.\n</think>\n\nParis.", "<think>Hm.</think>Paris.", "Paris."),
    ],
)
def test_what_follows_the_thinking_is_compared(reference: str, answer: str, compared: str) -> None:
    said = AnswerPair(reference, answer, True, "x" * 6, compared, 3)
    found = {name: score.point() for name, score in answer_scores([said]).items()}
    assert said.compared[1] == compared
    right = said.compared[0] == compared
    assert found["exact_match"] == found["contains"] == float(right) == float(said.exact)
    assert (found["chrf"] == 100.0) == right
    assert (found["answer_tokens"], found["length_ratio"]) == (3, 0.5)
    assert found["stop_rate"] == 1.0


def test_a_refusal_that_is_only_thought_is_none() -> None:
    thought = "<think>I'm sorry, but I can't.</think>Of course."
    late = f"<think>{'Hm. ' * 99}</think>I'm sorry, but I can't."
    refused = [
        answer_scores([AnswerPair("Yes", answer, True, "y", "y", 1)])["refusal_rate"].point()
        for answer in (thought, late)
    ]
    assert refused == [0.0, 1.0]


def test_all_scores_of_three_answers_by_hand() -> None:
    found = answer_scores(
        [
            AnswerPair("Yes", "Well,  YES indeed", True, [1], [2, 1, 3], 3),
            AnswerPair("a b", "I'm sorry, but I can't say.", False, [1, 2], [4, 4, 4, 4, 4, 4], 7),
            AnswerPair("c", "c", True, [9], [9], 1),
        ]
    )
    points = {name: score.point() for name, score in found.items()}
    assert points["exact_match"] == pytest.approx(1 / 3)
    assert points["contains"] == pytest.approx(2 / 3)
    assert points["stop_rate"] == pytest.approx(2 / 3)
    assert points["answer_tokens"] == pytest.approx(11 / 3)
    assert points["length_ratio"] == pytest.approx(11 / 4)
    assert points["refusal_rate"] == pytest.approx(1 / 3)
    assert points["distinct_1"] == pytest.approx(5 / 10)  # 2 1 3 4 9
    assert points["distinct_2"] == pytest.approx(3 / 7)  # 21 13 44
    assert points["repetition"] == pytest.approx((0 + 2 / 3 + 0) / 3)  # 4444 three times
    some = measure.take(found, np.array([0, 2]))
    assert some["distinct_1"].point() == pytest.approx(4 / 4)
    assert some["exact_match"].point() == pytest.approx(1 / 2)


def test_distinct_by_brute_force() -> None:
    rng = np.random.default_rng(3)
    said = [rng.integers(0, 9, rng.integers(0, 12)).tolist() for _ in range(15)]

    def plainly(said: list[list[int]], n: int) -> float:
        grams = [g for a in said for g in zip(*(a[i:] for i in range(n)), strict=False)]
        return len(set(grams)) / len(grams)

    for n in (1, 2):
        score = measure.distinct(said, n)
        assert score.point() == plainly(said, n)
        without = [plainly(said[:i] + said[i + 1 :], n) for i in range(15)]
        np.testing.assert_allclose(score.without_each(), without, rtol=1e-12)
    assert measure.distinct([[], [1]], 2).point() == 0.0


def test_losses_are_ratios_of_sums() -> None:
    loss, weight = np.array([2.0, 30.0, 0.5]), np.array([1.0, 10.0, 0.25])
    assert measure.ratio(loss, weight).point() == pytest.approx(32.5 / 11.25)
    assert measure.exp_of_ratio(loss, weight).point() == pytest.approx(math.exp(32.5 / 11.25))
    assert math.isnan(measure.ratio([1.0], [0.0]).point())


@pytest.mark.parametrize("phrase", PHRASINGS)
def test_refusals(phrase: str) -> None:
    for made in (phrase, phrase.lower(), phrase.replace("'", "\u2019"), f"Hm. {phrase} do that."):
        assert refuses(made), made
    assert not refuses("x" * 400 + phrase)


def test_the_guide_lists_the_phrasings() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"(?:^> .*\n)+", guide, re.MULTILINE)
    assert tuple(listed.replace("\n> ", " ")[2:].strip().split(" \u00b7 ")) == PHRASINGS


@pytest.mark.parametrize(
    "answer",
    ["", "Yes.", "I can help with that.", "The laptop cannot be sent back.", "I was an AI once.",
     "Has an AI said so?", "You are unable to return it."],
)  # fmt: skip
def test_what_is_no_refusal(answer: str) -> None:
    assert not refuses(answer)


@pytest.mark.parametrize(("tokens", "share"), [("", 0), ("abc", 0), ("abcd", 0), ("aaaaa", 1 / 2)])
def test_repetition(tokens: str, share: float) -> None:
    assert repetition(tokens) == share
    assert repetition(list(itertools.chain("xyz", tokens))) <= max(share, 1 / 2)
