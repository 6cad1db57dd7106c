"""Measuring a model: its losses example by example, and its answers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtune.cli import note
from jaxtune.config import Config
from jaxtune.data.dataset import Dataset, eval_rows
from jaxtune.data.progress import largest_id
from jaxtune.evaluation.general import GeneralText, batches
from jaxtune.evaluation.judge.pairwise import Outcome
from jaxtune.evaluation.questions import Question
from jaxtune.evaluation.scores.answers import AnswerPair, answer_scores
from jaxtune.evaluation.scores.score import Score, exp_of_ratio, ratio
from jaxtune.inference import generate
from jaxtune.inference.load import GenerationModel, TextCodec
from jaxtune.inference.sampling import Sampling
from jaxtune.parallel.mesh import row_shards
from jaxtune.training.evaluation import Examples, each_example
from jaxtune.training.initial_weights import check_ids
from jaxtune.training.program import build_token_losses


class Inputs(NamedTuple):
    """A data set, plain text and questions, and how they become tokens: equal for both models."""

    codec: TextCodec
    dataset: Dataset
    general: GeneralText | None
    questions: Sequence[Question]
    label: re.Pattern[str] | None = None


class Measured(NamedTuple):
    """A model's scores and answers.

    `losses` are scores of the examples, `general` of the documents of general text, with how
    many tokens of each were predicted; `answers` of the questions.
    """

    losses: Mapping[str, Score]
    tokens: Any  # i64 [examples]
    general: Mapping[str, Score]
    general_tokens: int
    answers: Mapping[str, Score]
    generations: list[dict[str, Any]]
    judge: Mapping[str, Any] | None = None


def measure(
    model: GenerationModel,
    config: Config,
    inputs: Inputs,
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> Measured:
    """Measure a model on everything in `inputs`.

    Raises: `ConfigError` for tokens that the model has no row for, `DataError` for a question
    that is too long for it.
    """
    codec, dataset, general, questions, label = inputs
    for data in (dataset, *([general.texts] if general else ())):
        check_ids(largest_id(data), model.name, model.spec, codec.tokenizer)
    rows = config.per_device_eval_batch_size * row_shards(model.mesh)
    sums = _each(model, eval_rows(dataset, rows, packing=config.packing), len(dataset))
    plain = None
    if general is not None:
        windows = _each(model, batches(general, rows), len(general.windows))
        plain = _by_document(windows, general)
    pairs: list[AnswerPair] = []
    if questions:
        note(f"{model.name}: generating answers to {len(questions)} questions")
        pairs = _answer_pairs(model, inputs, max_new_tokens, sampling)
    return Measured(
        losses=_scores(sums),
        tokens=sums.tokens,
        general={} if plain is None else _scores(plain),
        general_tokens=0 if plain is None else int(plain.tokens.sum()),
        answers=answer_scores(pairs, label) if pairs else {},
        generations=[
            {
                "dataset": question.dataset,
                "prompt": question.prompt,
                "reference": question.reference,
                "response": each.answer,
                "stopped": each.stopped,
                "tokens": each.made,
                "exact_match": each.exact,
            }
            for question, each in zip(questions, pairs, strict=True)
        ],
    )


def with_verdicts(measured: Measured, outcomes: Sequence[Outcome], judge: str) -> Measured:
    """Add `win_rate` to the scores of the answers, ties as halves, over those with a verdict."""
    points = [outcome.points for outcome in outcomes]
    judged = [point is not None for point in points]
    won = ratio([point or 0.0 for point in points], judged)
    counts = Counter(points)
    names = {1.0: "win", 0.5: "tie", 0.0: "loss", None: None}
    return measured._replace(
        answers={**measured.answers, "win_rate": won._replace(rate=True)},
        generations=[
            {**row, "verdict": names[point]}
            for row, point in zip(measured.generations, points, strict=True)
        ],
        judge={
            "model": judge,
            "wins": counts[1.0],
            "ties": counts[0.5],
            "losses": counts[0.0],
            "inconsistent": sum(not outcome.agreed for outcome in outcomes),
            "unparseable": sum(outcome.why == "unparseable" for outcome in outcomes),
            "failed": sum(outcome.why not in ("", "unparseable") for outcome in outcomes),
        },
    )


def _each(
    model: GenerationModel, batches: Iterable[tuple[Any, Sequence[Sequence[int]]]], count: int
) -> Examples:
    losses = build_token_losses(model.spec, model.mesh, dtype=model.dtype)
    with jax.set_mesh(model.mesh):
        variables = {"params": model.params}
        return each_example(losses, variables, batches, count=count, mesh=model.mesh)


def _by_document(sums: Examples, general: GeneralText) -> Examples:
    """Add up the windows of a document: they are no independent witnesses."""
    documents = [document for document, _, _ in general.windows]
    _, of_window = np.unique(documents, return_inverse=True)
    return sums._replace(**{
        name: np.bincount(of_window, column).astype(column.dtype)
        for name, column in sums._asdict().items()
    })  # fmt: skip


def _scores(sums: Examples) -> dict[str, Score]:
    return {
        "eval_loss": ratio(sums.loss, sums.weight),
        "eval_perplexity": exp_of_ratio(sums.loss, sums.weight),
        "eval_token_accuracy": ratio(sums.correct, sums.weight),
    }


def _answer_pairs(
    model: GenerationModel, inputs: Inputs, max_new_tokens: int, sampling: Sampling
) -> list[AnswerPair]:
    """Answer all questions."""
    codec, questions = inputs.codec, inputs.questions
    answers = generate.generate(
        model,
        codec,
        [
            generate.prompt_ids(model, question.codec, question.conversation)
            for question in questions
        ],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        templates=[question.codec.template for question in questions],
    )
    return [
        AnswerPair(
            reference=question.reference,
            answer=answer.text,
            stopped=answer.stopped,
            reference_tokens=question.reference_ids,
            tokens=codec.tokenizer.encode(question.spoken(answer.text).strip()),
            made=answer.tokens,
        )
        for question, answer in zip(questions, answers, strict=True)
    ]
