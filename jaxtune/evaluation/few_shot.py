"""Examples in the prompt: what a model can do that is shown the task, and not tuned on it.

The examples are records of the training data, drawn by the seed, the same before every question. A
data set with them is read as any other, their turns in front of each conversation, so that losses
and answers are of the same prompts, in the template.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from jaxtune.cli import shows_notes
from jaxtune.config import Config, ConfigError, DataError, DatasetConfig
from jaxtune.data.dataset import Dataset, open_dataset
from jaxtune.data.in_prompt import FewShotExample, as_example, behind_examples
from jaxtune.data.open import open_sides, preprocess_config
from jaxtune.data.packing import permutation
from jaxtune.data.preprocess import format_of, noun_of, read
from jaxtune.evaluation.measured import Inputs
from jaxtune.terminal.progress import TokenizeProgress

_ROW_STEP = 128  # tokens that the rows of a batch are rounded up to: mesh.context divides them
_LOOKED_AT = 20  # records for each example to draw: some are no conversations, or ask the same


class ExampleRow(NamedTuple):
    """The place of an example: the data set's name, and its row from 0."""

    dataset: str
    row: int


class FewShot(NamedTuple):
    """The inputs of an evaluation behind `shots` examples, question for question.

    `rows` are of one example more: it takes the place of one that is asked itself.
    """

    shots: int
    rows: tuple[ExampleRow, ...]
    inputs: Inputs


def open_few_shot(
    config: Config,
    entries: Sequence[DatasetConfig],
    inputs: Inputs,
    *,
    count: int,
    positions: int,
) -> FewShot:
    """Put `count` examples of the training data, else of `entries`, before all that is evaluated.

    Raises: `ConfigError` where they do not fit a model of so many `positions`; `DataError`.
    """
    if config.train_on == "all":
        raise ConfigError(
            "few_shot: with train_on all the loss would be of the examples too. Set train_on "
            "assistant."
        )
    drawn = _draw(config, entries, inputs, count)
    turns = tuple(drawn.values())
    settings = preprocess_config(config, *inputs.codec)._replace(
        prompt_loss_weight=0.0, examples=turns, max_length=positions, truncation="drop"
    )
    needed = len(inputs.dataset)
    try:
        with TokenizeProgress(quiet=not shows_notes()) as progress:
            processes = config.dataset_num_proc
            behind = open_dataset(entries, settings, processes=processes, progress=progress)
    except DataError as error:
        raise ConfigError(_too_many(needed, needed, count, positions, str(error))) from None
    behind = behind.of_records(inputs.dataset)
    if len(behind) < needed:
        left_out = needed - len(behind)
        raise ConfigError(_too_many(left_out, needed, count, positions, _why(behind)))
    longest = int(behind.token_counts.max())
    behind = replace(behind, max_length=-(-longest // _ROW_STEP) * _ROW_STEP)
    questions = [
        question._replace(conversation=behind_examples(question.conversation, turns))
        for question in inputs.questions
    ]
    own = inputs._replace(dataset=behind, general=None, questions=questions)
    return FewShot(count, tuple(drawn), own)


def _too_many(left_out: int, needed: int, count: int, positions: int, why: str) -> str:
    return (
        f"few_shot: with {count} examples before them {left_out} of {needed} examples do not fit "
        f"the {positions} positions of the model: {why.rstrip('.')}. Set a smaller few_shot."
    )


def _why(behind: Dataset) -> str:
    """Give the commonest reason for which a row was dropped."""
    dropped = {
        reason: (found["count"], found["first"][0]["detail"])
        for source in behind.sources
        for reason, found in source.stored.summary["dropped"].items()
    }
    reason = max(dropped, key=lambda reason: dropped[reason], default="")
    return f"{reason}: {dropped[reason][1]}" if reason else "they are not read alike"


def _draw(
    config: Config,
    entries: Sequence[DatasetConfig],
    inputs: Inputs,
    count: int,
) -> dict[ExampleRow, FewShotExample]:
    """Draw one example more than `count`, no two with the same questions."""
    dataset = inputs.dataset
    if config.datasets:
        entries = config.datasets
        with TokenizeProgress(quiet=not shows_notes()) as progress:
            dataset, _ = open_sides(config, *inputs.codec, progress=progress)
    rows, sources = dataset.gather("rows").tolist(), dataset.source_of.tolist()
    order = permutation(len(dataset), config.seed)[: _LOOKED_AT * (count + 1)].tolist()
    wanted = {(sources[i], rows[i]): None for i in order}
    there = {
        (number, row): example
        for number, entry in enumerate(entries)
        for row, example in _examples(entry, {row for source, row in wanted if source == number})
    }
    by_questions: dict[tuple[str, ...], tuple[int, int]] = {}
    for place in wanted:
        if place in there:
            by_questions.setdefault(there[place].questions, place)
    drawn = {
        ExampleRow(dataset.names[source], row): there[source, row]
        for source, row in list(by_questions.values())[: count + 1]
    }
    if len(drawn) <= count:
        raise DataError(
            f"few_shot: {count} examples need {count + 1} different conversations to draw from; "
            f"{', '.join(dict.fromkeys(dataset.names))} has {len(drawn)}. Set a smaller few_shot."
        )
    return drawn


def _examples(entry: DatasetConfig, rows: set[int]) -> Iterator[tuple[int, FewShotExample]]:
    """Yield the records with these numbers that can stand before a question."""
    name = format_of(entry)
    for row, record in read(entry):
        if row > max(rows, default=-1):
            return
        if row in rows:
            example = as_example(noun_of(record, name, entry))
            if example is not None:
                yield row, example
