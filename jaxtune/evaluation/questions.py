"""The examples of an evaluation, the questions among them, and the groups they fall into."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from jaxtune.cli import note, shows_notes
from jaxtune.config import Config, ConfigError, DataError, DatasetConfig
from jaxtune.data.dataset import Dataset
from jaxtune.data.open import open_entries, open_sides
from jaxtune.data.preprocess import format_of, noun_of, read
from jaxtune.data.report.columns import column_names, column_values
from jaxtune.data.report.data_report import by_dataset
from jaxtune.data.schema import Conversation
from jaxtune.data.templating.answer_text import affixes, answer_ids, text_of
from jaxtune.data.templating.masking import render_prompt
from jaxtune.data.templating.template import variant
from jaxtune.data.tokenize import tokenize_prompt
from jaxtune.evaluation.scores.reasoning import spoken
from jaxtune.inference.load import TextCodec
from jaxtune.terminal.progress import TokenizeProgress
from jaxtune.terminal.text import lost_lines

MOST_VALUES = 20  # of a column that are values of their own; the others are one group
OTHER = "other"


class Question(NamedTuple):
    """A conversation to answer, and the answer that the data has for it."""

    dataset: str
    example: int  # its first, by number in the dataset
    codec: TextCodec  # with the template as the conversation has it
    conversation: Conversation
    reference: str  # as a model says it that has learnt the example by heart
    reference_ids: tuple[int, ...]  # without the end of turn

    @property
    def prompt(self) -> str:
        """Render the text that the model reads."""
        turns = self.conversation
        spans = render_prompt(self.codec.template, turns.messages, tools=turns.tools)
        return "".join(span.text for span in spans)

    @property
    def prompt_ids(self) -> list[int]:
        """Tokenize the prompt."""
        turns, codec = self.conversation, self.codec
        return tokenize_prompt(codec.template, codec.tokenizer, turns.messages, tools=turns.tools)

    @property
    def transcript(self) -> str:
        """Write the turns for a reader, without the marks of a template."""
        turns = [
            (m.role, "\n".join(filter(None, (m.content, m.input))))
            for m in self.conversation.messages
        ]
        return turns[0][1] if len(turns) == 1 else "\n\n".join(f"{r}: {t}" for r, t in turns)

    def spoken(self, answer: str) -> str:
        """Drop the thinking of an answer, or of the reference."""
        return spoken(answer, self.reference)


class Column(NamedTuple):
    """A column of the data, and its value in each example: at most `MOST_VALUES` and `OTHER`."""

    name: str
    values: NDArray[np.object_]


def entries_of(config: Config, dataset: str | None) -> Sequence[DatasetConfig]:
    """Choose `dataset`, else the config's eval_datasets or datasets. Raises `ConfigError`."""
    if dataset is not None:
        return (DatasetConfig(path=dataset, columns=config.columns, roles=config.roles),)
    entries = config.eval_datasets or config.datasets
    if not entries:
        raise ConfigError("dataset is not set. Give --dataset FILE, or a --config that has data.")
    return entries


def open_data(config: Config, entries: Sequence[DatasetConfig], codec: TextCodec) -> Dataset:
    """Open the examples; of the config's own datasets those that eval_split holds out."""
    with TokenizeProgress(quiet=not shows_notes()) as progress:
        if entries is config.datasets and config.eval_split:
            _, held_out = open_sides(config, *codec, progress=progress)
        else:
            held_out = open_entries(config, entries, *codec, progress=progress)
    dataset = cast(Dataset, held_out)
    for line in (*lost_lines(by_dataset(dataset)), *dataset.notes):
        note(line)
    return dataset


def open_column(dataset: Dataset, entries: Sequence[DatasetConfig], name: str) -> Column:
    """Read a column. Raises `DataError` if no record that is evaluated has it."""
    values = column_values(dataset, entries, name)
    if values is None:
        there = ", ".join(column_names(entries))
        raise DataError(
            f"by: no record that is evaluated has a column '{name}'. The first has: {there}."
        )
    named = Counter(values.tolist()).most_common(MOST_VALUES)
    common = {value for value, _ in named}
    return Column(name, np.array([v if v in common else OTHER for v in values], object))


def questions_of(
    entries: Sequence[DatasetConfig], dataset: Dataset, codec: TextCodec, limit: int
) -> tuple[Question, ...]:
    """List the first `limit` conversations of each entry that are among the examples of `dataset`.

    Raises: `DataError` if none is.
    """
    if not limit:
        return ()
    rows = dataset.gather("rows")
    questions: list[Question] = []
    for number, entry in enumerate(entries):
        own = np.flatnonzero(dataset.source_of == number)
        first = dict(zip(rows[own[::-1]].tolist(), own[::-1].tolist(), strict=True))
        every = _conversations(entry, dataset.names[number], first, codec)
        questions += itertools.islice(every, limit)
    if not questions:
        raise DataError(
            f"{entries[0].path}: has no question to answer: its rows are plain text, or answers "
            "without words. Set generate 0, or give conversations."
        )
    return tuple(questions)


def that_fit(questions: Sequence[Question], positions: int) -> tuple[Question, ...]:
    """Choose those that leave a model of so many positions one for its answer; note the others.

    Raises: `DataError` if none does.
    """
    sizes = [len(question.prompt_ids) for question in questions]
    fit = tuple(q for q, size in zip(questions, sizes, strict=True) if size < positions)
    if len(fit) == len(questions):
        return fit
    of = Counter(q.dataset for q, size in zip(questions, sizes, strict=True) if size >= positions)
    message = (
        f"{len(questions) - len(fit)} of {len(questions)} questions are too long for "
        f"{positions} positions ({', '.join(f'{name}: {n}' for name, n in of.items())}); the "
        f"longest has {max(sizes)} tokens"
    )
    if not fit:
        raise DataError(f"generate: {message}. Set generate 0, or give shorter conversations.")
    note(f"generate: {message}. They are left out")
    return fit


def _conversations(
    entry: DatasetConfig, name: str, first: dict[int, int], codec: TextCodec
) -> Iterator[Question]:
    """Yield the questions of an entry; `first` maps each row evaluated to its first example."""
    own = variant(
        codec.template, codec.tokenizer, template=entry.template, system_prompt=entry.system_prompt
    )
    own_affixes = affixes(own, codec.tokenizer)
    format_name = format_of(entry)
    for row, record in read(entry):
        if row not in first:
            continue
        noun = noun_of(record, format_name, entry)
        if not isinstance(noun, Conversation):
            continue
        last = max(i for i, m in enumerate(noun.messages) if m.role == "assistant")
        if not noun.messages[last].content.strip():  # a tool call alone is no answer in words
            continue
        until = noun._replace(messages=noun.messages[: last + 1])
        ids = answer_ids(own, codec.tokenizer, until)
        if ids is None:  # an earlier answer of the record is trained, this one cannot be
            continue
        turns = noun._replace(messages=noun.messages[:last])
        template = own.for_conversation(noun)
        left_out = own_affixes if template is own else affixes(template, codec.tokenizer)
        reference = left_out.content(text_of(codec.tokenizer, ids, behind=template.stop_id))
        if spoken(reference, reference).strip():
            own_codec = codec._replace(template=template)
            yield Question(name, first[row], own_codec, turns, reference, tuple(ids))
