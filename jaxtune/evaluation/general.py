"""Plain text in windows, to measure how much a model forgets of data that it was not tuned on.

Documents longer than a row are cut into windows. Each of their tokens is predicted once, the end of
a document never: it belongs to no text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxtune.cli import note, shows_notes
from jaxtune.config import Config, DataError, DatasetConfig
from jaxtune.data import packing
from jaxtune.data.dataset import Dataset
from jaxtune.data.open import open_entries
from jaxtune.data.schema import Batch, Example, WeightedTokens
from jaxtune.data.tokenize import shift
from jaxtune.inference.load import TextCodec
from jaxtune.terminal.progress import TokenizeProgress


class GeneralText(NamedTuple):
    """A set of windows `(document, from, to)` of the tokens of `texts`; a window's first token is
    not predicted in it. `row_length` is that of a row of the batch."""

    path: str
    texts: Dataset
    windows: tuple[tuple[int, int, int], ...]
    row_length: int

    def example(self, number: int) -> Example:
        document, start, stop = self.windows[number]
        ids, weights = self.texts.tokens(document)
        return shift(WeightedTokens(ids[start:stop], weights[start:stop]))


def open_general(config: Config, path: str, codec: TextCodec) -> GeneralText:
    """Cut a file of text into windows. Raises `DataError` where it cannot be read as text."""
    whole = config.model_copy(update={"max_length": 2**30})  # windows are cut here
    entry = DatasetConfig(path=path, format="text")
    with TokenizeProgress(quiet=not shows_notes()) as progress:
        texts = open_entries(whole, (entry,), codec.tokenizer, codec.template, progress=progress)
    length, windows = config.max_length, []
    closed = bool(codec.template.closing)
    for document, size in enumerate((texts.token_counts - closed).tolist()):
        windows += [(document, at, min(at + length + 1, size)) for at in range(0, size - 1, length)]
    if not windows:
        raise DataError(f"{path}: no text in it has two tokens, so there is nothing to predict.")
    if len({document for document, _, _ in windows}) == 1:
        note(
            f"{path}: is one document, so its loss has no interval. Blank lines end a document of "
            ".txt; in .jsonl each row is one."
        )
    return GeneralText(path, texts, tuple(windows), length)


def batches(general: GeneralText, batch_size: int) -> Iterator[tuple[Batch, list[list[int]]]]:
    """Yield every window once, packed, with the numbers of those in each row."""
    lengths = np.array([stop - start - 1 for _, start, stop in general.windows])
    bins = packing.best_fit_decreasing(np.sort(lengths)[::-1], general.row_length)
    rows = packing.in_order(bins, lengths)
    for first in range(0, len(rows.starts) - 1, batch_size):
        here = [
            rows.examples[rows.starts[row] : rows.starts[row + 1]].tolist()
            if row < len(rows.starts) - 1
            else []
            for row in range(first, first + batch_size)
        ]
        yield packing.packed_batch(here, general.example, general.row_length), here
