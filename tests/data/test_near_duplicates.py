"""Nearly the same, against brute force over sets of three-word runs."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.data.report.near_duplicates import PLACES, first_near_duplicates, signatures

WORDS = [f"word{i}" for i in range(400)]


def runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    words += [""] * (3 - len(words))
    return set(zip(words, words[1:], words[2:], strict=False))


def jaccard(a: str, b: str) -> float:
    return len(runs(a) & runs(b)) / len(runs(a) | runs(b))


def test_agreement_is_about_the_jaccard_index() -> None:
    drawn = np.random.default_rng(0)
    base = drawn.choice(WORDS, 200).tolist()
    texts = []
    for changed in (0, 2, 5, 10, 30):
        words = list(base)
        for at in drawn.choice(200, changed, replace=False):
            words[at] = "changed"
        texts.append(" ".join(words))
    found = signatures(texts)
    for a, b in itertools.combinations(range(len(texts)), 2):
        expected = jaccard(texts[a], texts[b])
        # 32 draws: four standard deviations of a share are at most 4 * 0.5 / sqrt(32).
        assert abs((found[a] == found[b]).mean() - expected) < 0.36
    agree = [(found[0] == row).mean() for row in found]
    assert agree == sorted(agree, reverse=True)


def test_a_signature_depends_on_its_own_text_only() -> None:
    texts = ["", "one", "one two", "a b c", "a b c d e f", "東京は日本の首都です", "東京"]
    together = signatures(texts)
    assert together.shape == (len(texts), PLACES)
    for text, row in zip(texts, together, strict=True):
        np.testing.assert_array_equal(signatures([text])[0], row)
    assert len(np.unique(together, axis=0)) == len(texts)
    assert signatures([]).shape == (0, PLACES)


def test_case_and_punctuation_do_not_count() -> None:
    one, other = signatures(["What is JAX, really?", "what is jax really"])
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("blanks", [True, False])
def test_one_changed_word_is_found_and_other_texts_are_not(blanks: bool) -> None:
    drawn = np.random.default_rng(1)
    rows = [drawn.choice(WORDS, 60).tolist() for _ in range(300)]
    if not blanks:  # a language without them: every letter is a word
        rows = [[chr(0x4E00 + int(word[4:])) for word in row] for row in rows]
    copies = [[*rows[i][:30], rows[i + 1][0], *rows[i][31:]] for i in range(100)]
    texts = [("" if not blanks else " ").join(row) for row in rows + copies]
    found = first_near_duplicates(signatures(texts))
    assert (found[:300] == len(texts)).all()
    assert (found[300:] == np.arange(100)).mean() >= 0.9  # of expected 0.97: binomial, 32 places


@given(st.lists(st.sampled_from(["a b c", "a b c d", "x y z", "", "q"]), max_size=20))
@settings(max_examples=60, deadline=None)
def test_the_first_of_equals_is_named(texts: list[str]) -> None:
    first = {text: texts.index(text) for text in texts}
    expected = [first[t] if first[t] < i else len(texts) for i, t in enumerate(texts)]
    assert first_near_duplicates(signatures(texts)).tolist() == expected
