"""Overlap of an answer and its reference: ROUGE-L, chrF, BLEU, by the packages that define them.

chrF and BLEU are scores of a whole set of answers, made of counts that add up over them. sacrebleu
counts; the score of added counts is taken here, of all resamples at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from jaxtune.evaluation.scores.score import Floats, Measure, mean

_CHRF_ORDER, _BETA = 6, 2.0  # sacrebleu's defaults, chrF2
_BLEU_ORDER = 4


def rouge_l(references: Sequence[str], answers: Sequence[str]) -> Measure:
    """Compute the mean f-measure of the rouge-score package without stemming, 0 to 1.

    It sees Latin letters and digits only: answers in other scripts score 0.
    """
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(references, answers, strict=True)
    return mean([scorer.score(a, b)["rougeL"].fmeasure for a, b in pairs])


def chrf(references: Sequence[str], answers: Sequence[str]) -> Measure:
    """Compute chrF2 of the whole set, 0 to 100: letters, so it knows every script."""
    # What the package's own significance test resamples: [answer, reference, match] by order.
    counts = CHRF()._extract_corpus_statistics(list(answers), [list(references)])
    return Measure(np.asarray(counts, np.float64), _chrf)


def bleu(references: Sequence[str], answers: Sequence[str]) -> Measure:
    """Compute BLEU of the whole set, 0 to 100, with sacrebleu's tokens (13a) and smoothing
    (exp)."""
    # [answer length, reference length, matches by order, n-grams by order]
    counts = BLEU(force=True)._extract_corpus_statistics(list(answers), [list(references)])
    return Measure(np.asarray(counts, np.float64), _bleu)


def _chrf(sums: Floats) -> Floats:
    of_order = sums.reshape(*sums.shape[:-1], _CHRF_ORDER, 3)
    answer, reference, match = np.moveaxis(of_order, -1, 0)
    there = (answer > 0) & (reference > 0)
    orders = np.maximum(1, there.sum(axis=-1))
    precision = np.where(there, match / np.maximum(1, answer), 0).sum(axis=-1) / orders
    recall = np.where(there, match / np.maximum(1, reference), 0).sum(axis=-1) / orders
    below = _BETA**2 * precision + recall
    above = (1 + _BETA**2) * precision * recall
    score: Floats = 100 * above / np.where(below > 0, below, 1.0)
    return score


def _bleu(sums: Floats) -> Floats:
    answer, reference = sums[..., 0], sums[..., 1]
    match = sums[..., 2 : 2 + _BLEU_ORDER]
    total = sums[..., 2 + _BLEU_ORDER :]
    # Orders without a match count as half a match, the next as a quarter, ... (NIST's smoothing).
    smoothed = 0.5 ** np.cumsum(match == 0, axis=-1)
    logs = np.log(np.where(match > 0, match, smoothed) / np.maximum(1, total))
    brevity = np.exp(np.minimum(0, 1 - reference / np.maximum(1, answer)))
    score = 100 * brevity * np.exp(logs.mean(axis=-1))
    return np.where(match.any(axis=-1) & (total > 0).all(axis=-1), score, 0.0)
