"""Every score of a set of answers against their references."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from jaxtune.evaluation.scores.reasoning import spoken
from jaxtune.evaluation.scores.refusals import refuses
from jaxtune.evaluation.scores.score import Score, distinct, mean, rate, ratio
from jaxtune.evaluation.scores.text_overlap import bleu, chrf, rouge_l

_REPEATED = 4  # tokens of an n-gram that is looked for again


class AnswerPair(NamedTuple):
    """An answer and the one that was expected, both whole, thinking included. `reference_tokens`
    are those that were expected, without the end; `made` is how many the model made. `tokens` are
    of what follows the answer's thinking, read again."""

    reference: str
    answer: str
    stopped: bool
    reference_tokens: Sequence[Hashable]
    tokens: Sequence[Hashable]
    made: int

    @property
    def compared(self) -> tuple[str, str]:
        """Return reference and answer without their thinking."""
        return spoken(self.reference, self.reference), spoken(self.answer, self.reference)

    @property
    def exact(self) -> bool:
        reference, answer = self.compared
        return reference.strip() == answer.strip()


def answer_scores(
    answered: Sequence[AnswerPair], label: re.Pattern[str] | None = None
) -> dict[str, Score]:
    """Score answers, by the names of `evaluate --json`; docs/evaluate.md explains each.

    With `label` also whether an answer has the label of its reference, over those that have one.
    """
    pairs = [s.compared for s in answered]
    references, answers = [a for a, _ in pairs], [b for _, b in pairs]
    tokens = [s.tokens for s in answered]
    lengths, expected = [s.made for s in answered], [len(s.reference_tokens) for s in answered]
    labels = {} if label is None else {"label_accuracy": _label_accuracy(label, pairs)}
    return {
        "exact_match": rate([s.exact for s in answered]),
        **labels,
        "contains": rate([_plain(a) in _plain(b) for a, b in pairs]),
        "rougeL": rouge_l(references, answers),
        "chrf": chrf(references, answers),
        "bleu": bleu(references, answers),
        "stop_rate": rate([s.stopped for s in answered]),
        "answer_tokens": mean(lengths),
        "length_ratio": ratio(lengths, expected),
        "refusal_rate": rate([refuses(answer) for answer in answers]),
        "distinct_1": distinct(tokens, 1),
        "distinct_2": distinct(tokens, 2),
        "repetition": mean([repetition(each) for each in tokens]),
    }


def label_of(pattern: re.Pattern[str], answer: str) -> str | None:
    """Return the first match in an answer, of a pattern with groups its first group.

    >>> label_of(re.compile(r"^(Yes|No)\\b"), " No, it is not.")
    'No'
    """
    match = pattern.search(answer.strip())
    return None if match is None else match[min(1, pattern.groups)]


def _label_accuracy(pattern: re.Pattern[str], pairs: Sequence[tuple[str, str]]) -> Score:
    labels = [[label_of(pattern, text) for text in pair] for pair in pairs]
    expected = [reference is not None for reference, _ in labels]
    right = [there and a == b for there, (a, b) in zip(expected, labels, strict=True)]
    return ratio(right, expected)._replace(rate=True)


def repetition(tokens: Sequence[Hashable], n: int = _REPEATED) -> float:
    """Compute the share of n-grams that stood in the same answer before, 0 if it is shorter than n.

    Called seq-rep-n (Welleck et al., 2020).

    >>> repetition("abcdabcd")  # of abcd bcda cdab dabc abcd one is there again
    0.2
    """
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


def _plain(text: str) -> str:
    """Drop what `contains` does not look at: the case of letters, and how wide a blank is."""
    return " ".join(text.casefold().split())
