"""Answers of models on a page: samples step by step, base beside tuned with the words that differ.

Takes plain values only. Prompts and answers are hostile: they pass through `escaped`.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxtune.reporting.html.markup import Markup, escaped

_ANSWERS, _OPEN = 50, 8  # of an evaluation file that are shown; those not folded away
_PROMPTS, _STEPS = 20, 8  # of samples.jsonl
_LONGEST = 4000  # letters of a text
_MOST_WORK = 1_000_000  # pairs of equal words looked at for a difference, about 0.3 seconds
_LONG = 400  # letters with their marks, from which a text scrolls
_ALIKE = 0.3  # below this share of common words two answers are shown as they are


def difference(before: str, after: str) -> tuple[Markup, Markup]:
    """Both texts as HTML: what only the first has in `<del>`, what only the second has in `<ins>`.

    Words and the blanks between them are compared. Texts with little in common stay plain: marks
    everywhere would show nothing. So do texts that repeat a few words so often that comparing them
    would take minutes, as answers do that loop.

    >>> difference("a red fox", "a blue fox")[1]
    'a <ins>blue</ins> fox'
    """
    before, after = _cut(before), _cut(after)
    old, new = _words(before), _words(after)
    found = _opcodes(old, new)
    shared = _letters(w for what, a, b, *_ in found if what == "equal" for w in old[a:b])
    if 2 * shared < _ALIKE * (_letters(old) + _letters(new)):
        return Markup(escaped(before)), Markup(escaped(after))
    left, right = "", ""
    for what, a, b, c, d in found:
        gone, come = escaped("".join(old[a:b])), escaped("".join(new[c:d]))
        left += gone if what == "equal" or not gone else f"<del>{gone}</del>"
        right += come if what == "equal" or not come else f"<ins>{come}</ins>"
    return Markup(left), Markup(right)


def answer_cards(name: str, found: Mapping[str, Any]) -> str:
    """The answers that `evaluate --json` printed, a card per question; nothing without any."""
    answers, base = found.get("generations"), found.get("base")
    if not answers:
        return ""
    cards = _answers(answers, base and base.get("generations"))
    return f"<h3>Answers in {escaped(name)}</h3>{cards}"


def samples(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of samples.jsonl, by prompt: how the answer changed from step to step."""
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    cards = []
    for prompt, answers in itertools.islice(by_prompt.items(), _PROMPTS):
        lines, before = [], None
        for row in _spread(answers, _STEPS):
            text = Markup(escaped(_cut(row["response"])))
            if before is not None:
                text = difference(before, row["response"])[1]
            before = row["response"]
            ending = _ending(row.get("stopped"))
            lines.append(f"<div><dt>step {row['step']:,}{ending}</dt>{_said(text)}</div>")
        cards.append(f"<article>{_prompt(prompt)}<dl>{''.join(lines)}</dl></article>")
    return "".join(cards) + _more(len(by_prompt), _PROMPTS, "prompts", "samples.jsonl")


def _answers(tuned: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]] | None) -> str:
    """A card per question; with a base that answered the same questions both, else one.

    Tuned is compared with base; where these have little in common or are equal, with what was
    expected, which is then the difference that tells something.
    """
    paired = base is not None and [r["prompt"] for r in base] == [r["prompt"] for r in tuned]
    cards = []
    for i, row in enumerate(tuned[:_ANSWERS]):
        wanted, answer = row["reference"], row["response"]
        expected = Markup(escaped(_cut(wanted)))
        if paired and base is not None:
            before = base[i]["response"]
            left, right = difference(before, answer)
            against = "base"
            if not _marked(left, right):
                against = "expected"
                expected, right = difference(wanted, answer)
            against = f", beside {against}" if _marked(expected, left, right) else ""
            columns = [("base", left, base[i]), (f"tuned{against}", right, row)]
        else:
            expected, right = difference(wanted, answer)
            columns = [("answer", right, row)]
        said = "".join(
            f"<div><dt>{name}{_mark(found, wanted)}{_ending(found.get('stopped'))}</dt>"
            f"{_said(text)}</div>"
            for name, text, found in columns
        )
        cards.append(
            f'<article>{_prompt(row["prompt"])}<dl class="beside">'
            f'<div class="expected"><dt>expected</dt>{_said(expected)}</div>'
            f"{said}</dl></article>"
        )
    first, others = cards[:_OPEN], cards[_OPEN:]
    folded = (
        f"<details><summary>{len(others)} more answers</summary>{''.join(others)}</details>"
        if others
        else ""
    )
    return "".join(first) + folded + _more(len(tuned), _ANSWERS, "answers", "the file")


def _prompt(prompt: str) -> str:
    return (
        f'<h3 class="unseen">A question</h3><p class="asked" dir="auto">{escaped(_cut(prompt))}</p>'
    )


def _said(text: Markup) -> str:
    """A long text scrolls in its place, also with the keyboard."""
    if not text:
        return '<dd><i class="empty">nothing</i></dd>'
    long = ' class="long" tabindex="0"' if len(text) > _LONG else ""
    return f'<dd{long}><span class="said" dir="auto">{text}</span></dd>'


def _marked(*texts: str) -> bool:
    return any("<ins>" in text or "<del>" in text for text in texts)


def _mark(answer: Mapping[str, Any], wanted: str) -> str:
    same = answer.get("exact_match", answer["response"].strip() == wanted.strip())
    found = ' <b class="right">exact</b>' if same else ""
    word = answer.get("verdict")
    if word in ("win", "loss", "tie"):
        found += f' <i class="judged">judged a {word}</i>'
    return found


def _ending(stopped: Any) -> str:
    return "" if stopped is not False else ' <i class="wrong">did not stop</i>'


def _more(there: int, shown: int, what: str, where: str) -> str:
    if there <= shown:
        return ""
    return f'<p class="empty">The first {shown} of {there:,} {what}; {where} has all.</p>'


class _TooMuchWork(Exception):
    pass


class _Matcher(difflib.SequenceMatcher[str]):
    """Gives up after `_MOST_WORK`: of words that repeat the work grows with the third power. Blanks
    begin no match, they only go on with one, or every pair of them would be looked at."""

    def __init__(self, old: Sequence[str], new: Sequence[str]) -> None:
        super().__init__(str.isspace, old, new, autojunk=False)
        there = Counter(new)
        pairs = (0 if word.isspace() else there[word] for word in old)
        self._pairs = [0, *itertools.accumulate(pairs)]  # of all words before each
        self._work = 0

    def find_longest_match(
        self, alo: int = 0, ahi: int | None = None, blo: int = 0, bhi: int | None = None
    ) -> difflib.Match:
        self._work += self._pairs[-1 if ahi is None else ahi] - self._pairs[alo]
        if self._work > _MOST_WORK:
            raise _TooMuchWork
        return super().find_longest_match(alo, ahi, blo, bhi)


def _opcodes(old: list[str], new: list[str]) -> list[tuple[str, int, int, int, int]]:
    """`SequenceMatcher.get_opcodes`, where what both begin and end with costs nothing; nothing in
    common where it would be too much work."""
    begin = _alike(old, new)
    end = _alike(old[begin:][::-1], new[begin:][::-1])
    before, after = len(old) - end, len(new) - end
    try:
        middle = _Matcher(old[begin:before], new[begin:after]).get_opcodes()
    except _TooMuchWork:
        return [("replace", 0, len(old), 0, len(new))]
    return [
        ("equal", 0, begin, 0, begin),
        *((what, a + begin, b + begin, c + begin, d + begin) for what, a, b, c, d in middle),
        ("equal", before, len(old), after, len(new)),
    ]


def _alike(old: list[str], new: list[str]) -> int:
    """How many words both begin with."""
    pairs = zip(old, new, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|\s+|[^\w\s]", text)


def _letters(words: Iterable[str]) -> int:
    """Without blanks, which any two texts share."""
    return sum(len(word) for word in words if not word.isspace())


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _spread(rows: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of them, evenly, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]
