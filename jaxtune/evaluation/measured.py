"""One model measured: its losses example by example, and its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxtune.cli import note
from jaxtune.config import Config
from jaxtune.evaluation import general as texts
from jaxtune.evaluation.questions import Question
from jaxtune.evaluation.scores.answers import Said, answer_scores
from jaxtune.evaluation.scores.score import Score, exp_of_ratio, ratio

if TYPE_CHECKING:
    from jaxtune.data.dataset import Dataset
    from jaxtune.evaluation.general import General
    from jaxtune.evaluation.judge.pairwise import Outcome
    from jaxtune.inference.generate import Answer
    from jaxtune.inference.load import Model, Words
    from jaxtune.inference.sampling import Sampling
    from jaxtune.training.evaluation import Examples


class Measured(NamedTuple):
    """`losses` and `general` are scores of the examples and of the documents of general text, with
    how many tokens of each were predicted; `answers` of the questions."""

    losses: Mapping[str, Score]
    tokens: Any  # i64 [examples]
    general: Mapping[str, Score]
    general_tokens: int
    answers: Mapping[str, Score]
    generations: list[dict[str, Any]]
    judge: Mapping[str, Any] | None = None


def measure(
    model: Model,
    words: Words,
    config: Config,
    dataset: Dataset,
    general: General | None,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> Measured:
    """Raises `ConfigError` for tokens that the model has no row for, `DataError` for a question
    that is too long for it."""
    from jaxtune.data.dataset import eval_rows
    from jaxtune.data.progress import largest_id
    from jaxtune.parallel.mesh import row_shards
    from jaxtune.training.initial_weights import check_ids

    for data in (dataset, *([general.texts] if general else ())):
        check_ids(largest_id(data), model.name, model.spec, words.tokenizer)
    rows = config.per_device_eval_batch_size * row_shards(model.mesh)
    found = _each(model, eval_rows(dataset, rows, packing=config.packing), len(dataset))
    plain = None
    if general is not None:
        windows = _each(model, texts.batches(general, rows), len(general.windows))
        plain = _by_document(windows, general)
    said: list[Said] = []
    if questions:
        note(f"{model.name}: answering {len(questions)} questions")
        said = _said(model, words, questions, max_new_tokens, sampling)
    return Measured(
        losses=_scores(found),
        tokens=found.tokens,
        general={} if plain is None else _scores(plain),
        general_tokens=0 if plain is None else int(plain.tokens.sum()),
        answers=answer_scores(said) if said else {},
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
            for question, each in zip(questions, said, strict=True)
        ],
    )


def with_verdicts(found: Measured, outcomes: Sequence[Outcome], judge: str) -> Measured:
    """`win_rate` among the scores of the answers, ties as halves, over those with a verdict."""
    points = [outcome.points for outcome in outcomes]
    judged = [point is not None for point in points]
    won = ratio([point or 0.0 for point in points], judged)
    counts = Counter(points)
    words = {1.0: "win", 0.5: "tie", 0.0: "loss", None: None}
    return found._replace(
        answers={**found.answers, "win_rate": won._replace(rate=True)},
        generations=[
            {**row, "verdict": words[point]}
            for row, point in zip(found.generations, points, strict=True)
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
    model: Model, batches: Iterable[tuple[Any, Sequence[Sequence[int]]]], count: int
) -> Examples:
    import jax

    from jaxtune.training.evaluation import each_example
    from jaxtune.training.program import build_token_losses

    losses = build_token_losses(model.spec, model.mesh, dtype=model.dtype)
    with jax.set_mesh(model.mesh):
        variables = {"params": model.params}
        return each_example(losses, variables, batches, count=count, mesh=model.mesh)


def _by_document(found: Examples, general: General) -> Examples:
    """Windows of one document are no independent witnesses: their sums are added up."""
    documents = [document for document, _, _ in general.windows]
    _, of_window = np.unique(documents, return_inverse=True)
    return found._replace(**{
        name: np.bincount(of_window, sums).astype(sums.dtype)
        for name, sums in found._asdict().items()
    })  # fmt: skip


def _scores(found: Examples) -> dict[str, Score]:
    return {
        "eval_loss": ratio(found.loss, found.weight),
        "eval_perplexity": exp_of_ratio(found.loss, found.weight),
        "eval_token_accuracy": ratio(found.correct, found.weight),
    }


def _said(
    model: Model,
    words: Words,
    questions: Sequence[Question],
    max_new_tokens: int,
    sampling: Sampling,
) -> list[Said]:
    from jaxtune.inference.generate import answer, prompt_ids

    prompts = [prompt_ids(model, question.words, question.asked) for question in questions]
    answers: list[Answer] = answer(
        model,
        words,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        templates=[question.words.template for question in questions],
    )
    return [
        Said(
            reference=question.reference,
            answer=found.text,
            stopped=found.stopped,
            reference_tokens=question.reference_ids,
            tokens=words.tokenizer.encode(question.spoken(found.text).strip()),
            made=found.tokens,
        )
        for question, found in zip(questions, answers, strict=True)
    ]
