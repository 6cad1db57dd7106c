"""Overlap of an answer and its reference: ROUGE-L, chrF, BLEU, by the packages that define them.

chrF and BLEU are scores of a whole set of answers, made of counts that add up over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from jaxtune.evaluation.scores.score import Floats, Measure, mean


def rouge_l(references: Sequence[str], answers: Sequence[str]) -> Measure:
    """Compute the mean f-measure of the rouge-score package without stemming, 0 to 1.

    It sees Latin letters and digits only: answers in other scripts score 0.
    """
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(references, answers, strict=True)
    return mean([scorer.score(a, b)["rougeL"].fmeasure for a, b in pairs])


def chrf(references: Sequence[str], answers: Sequence[str]) -> Measure:
    """Compute chrF2 of the whole set, 0 to 100: letters, so it knows every script."""
    return _of_corpus(CHRF(), references, answers)


def bleu(references: Sequence[str], answers: Sequence[str]) -> Measure:
    """Compute BLEU of the whole set, 0 to 100, with sacrebleu's tokens (13a) and smoothing
    (exp)."""
    return _of_corpus(BLEU(force=True), references, answers)


def _of_corpus(metric: Any, references: Sequence[str], answers: Sequence[str]) -> Measure:
    """Measure by what the package's own significance test resamples: counts that add up."""
    counts = metric._extract_corpus_statistics(list(answers), [list(references)])

    def score(sums: Floats) -> Floats:
        return np.apply_along_axis(
            lambda added: metric._compute_score_from_stats(added.tolist()).score, -1, sums
        )

    return Measure(np.asarray(counts, np.float64), score)
