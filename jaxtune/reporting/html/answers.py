"""Answers of models on a page: samples step by step, base beside tuned with the words that differ.

Takes plain values only. Prompts and answers are hostile: they are escaped.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from jaxtune.html import escaped
from jaxtune.reporting.html.markup import part

_ANSWERS, _OPEN = 50, 8  # of an evaluation file that are shown; those not folded away
_PROMPTS, _STEPS = 20, 8  # of samples.jsonl
_LONGEST = 4000  # letters of a text
_ALIKE = 0.3  # below this share of common words two answers are shown as they are


class _Answer(NamedTuple):
    """A text of a card under its name, with its marks."""

    name: str
    text: Markup
    unstopped: bool = False
    exact: bool = False
    verdict: str = ""
    expected: bool = False


class _Card(NamedTuple):
    """A question with texts below or beside each other."""

    prompt: str
    answers: Sequence[_Answer]
    beside: bool


def difference(before: str, after: str) -> tuple[Markup, Markup]:
    """Mark words that only the first text has with `<del>`, those of the second with `<ins>`.

    Words and the blanks between them are compared. Texts with little in common stay plain: marks
    everywhere would show nothing. Texts that repeat a few words, as answers do that loop, stay
    plain too, if comparing them would take minutes.

    >>> difference("a red fox", "a blue fox")[1]
    Markup('a <ins>blue</ins> fox')
    """
    before, after = _cut(before), _cut(after)
    old, new = _words(before), _words(after)
    steps = _opcodes(old, new)
    shared = _letters(w for what, a, b, *_ in steps if what == "equal" for w in old[a:b])
    if 2 * shared < _ALIKE * (_letters(old) + _letters(new)):
        return escaped(before), escaped(after)
    left = right = Markup("")
    for what, a, b, c, d in steps:
        removed, added = escaped("".join(old[a:b])), escaped("".join(new[c:d]))
        equal = what == "equal"
        left += removed if equal or not removed else Markup(f"<del>{removed}</del>")
        right += added if equal or not added else Markup(f"<ins>{added}</ins>")
    return left, right


def answer_cards(name: str, evaluation: Mapping[str, Any]) -> Markup:
    """Write the answers of `evaluate --json`, a card per question; nothing without any."""
    answers, base = evaluation.get("generations"), evaluation.get("base")
    if not answers:
        return Markup("")
    cards = _answer_cards(answers, base and base.get("generations"))
    return part("answers", name, cards, _OPEN, len(answers))


def samples(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Write rows of samples.jsonl by prompt: how the answer changed from step to step."""
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    cards = []
    for prompt, every in itertools.islice(by_prompt.items(), _PROMPTS):
        shown = _spread(every, _STEPS)
        texts = [escaped(_cut(shown[0]["response"]))]
        texts += [difference(a["response"], b["response"])[1] for a, b in itertools.pairwise(shown)]
        answers = [
            _Answer(f"step {row['step']:,}", text, unstopped=row.get("stopped") is False)
            for row, text in zip(shown, texts, strict=True)
        ]
        cards.append(_Card(_cut(prompt), answers, beside=False))
    return part("samples", cards, len(by_prompt))


def _answer_cards(
    tuned: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]] | None
) -> list[_Card]:
    """Make a card per question; with a base that answered the same questions both, else one.

    Tuned is compared with base; where these have little in common or are equal, with what was
    expected, which is then the difference that tells something.
    """
    paired = base is not None and [r["prompt"] for r in base] == [r["prompt"] for r in tuned]
    cards = []
    for i, row in enumerate(tuned[:_ANSWERS]):
        reference, response = row["reference"], row["response"]
        expected = escaped(_cut(reference))
        if paired and base is not None:
            left, right = difference(base[i]["response"], response)
            against = "base"
            if not _marked(left, right):
                against = "expected"
                expected, right = difference(reference, response)
            name = f"tuned, beside {against}" if _marked(expected, left, right) else "tuned"
            answers = [
                _answer("base", left, base[i], reference),
                _answer(name, right, row, reference),
            ]
        else:
            expected, right = difference(reference, response)
            answers = [_answer("answer", right, row, reference)]
        cards.append(
            _Card(
                _cut(row["prompt"]),
                [_Answer("expected", expected, expected=True), *answers],
                beside=True,
            )
        )
    return cards


def _answer(name: str, text: Markup, row: Mapping[str, Any], reference: str) -> _Answer:
    verdict = row.get("verdict")
    return _Answer(
        name,
        text,
        unstopped=row.get("stopped") is False,
        exact=row.get("exact_match", row["response"].strip() == reference.strip()),
        verdict=verdict if verdict in ("win", "loss", "tie") else "",
    )


def _marked(*texts: str) -> bool:
    return any("<ins>" in text or "<del>" in text for text in texts)


def _opcodes(old: list[str], new: list[str]) -> list[tuple[str, int, int, int, int]]:
    """Compare word lists as `SequenceMatcher.get_opcodes`, with a common start and end for free.

    Blanks begin no match. Nor do the words of long texts that are everywhere in them (`autojunk`),
    which bounds the work on answers that loop.
    """
    begin = _common_start(old, new)
    end = _common_start(old[begin:][::-1], new[begin:][::-1])
    before, after = len(old) - end, len(new) - end
    middle = difflib.SequenceMatcher(str.isspace, old[begin:before], new[begin:after])
    return [
        ("equal", 0, begin, 0, begin),
        *(
            (what, a + begin, b + begin, c + begin, d + begin)
            for what, a, b, c, d in middle.get_opcodes()
        ),
        ("equal", before, len(old), after, len(new)),
    ]


def _common_start(old: list[str], new: list[str]) -> int:
    """Count the words that both begin with."""
    pairs = zip(old, new, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|\s+|[^\w\s]", text)


def _letters(words: Iterable[str]) -> int:
    """Count letters without blanks, which any two texts share."""
    return sum(len(word) for word in words if not word.isspace())


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _spread(rows: Sequence[Any], most: int) -> list[Any]:
    """Choose at most `most` rows, evenly, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]
