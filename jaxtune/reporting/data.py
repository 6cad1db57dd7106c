"""The data of a run, opened from its config: rows as they are trained, and the report."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxtune.cli import shows_notes
from jaxtune.config import Config, ConfigError
from jaxtune.data.dataset import Batches, Dataset
from jaxtune.data.open import open_sides, open_template, open_tokenizer, preprocess_config
from jaxtune.data.preprocess import PreprocessConfig, PreprocessedRow, dataset_names, preprocess
from jaxtune.data.report.data_report import (
    by_dataset,
    distribution,
    histograms,
    near_overlap,
    overlap,
    report,
)
from jaxtune.data.tokenize import token_texts
from jaxtune.reporting.html.data_page import ExampleView, TokenText
from jaxtune.terminal.progress import TokenizeProgress

_MOST_TOKENS = 2000  # of an example that a page shows: each costs it some 80 bytes


def open_settings(config: Config, *, note: Callable[[str], None]) -> PreprocessConfig:
    """Open what prepares the rows of a run.

    Raises: `ConfigError` if the config names no tokenizer or no data; `DataError`.
    """
    name = config.tokenizer_name or config.model_name_or_path
    if name is None:
        raise ConfigError("tokenizer_name is not set. Give --tokenizer_name FOLDER, or a model.")
    if not config.datasets:
        raise ConfigError("dataset is not set. Give --dataset FILE, or datasets in the config.")
    tokenizer = open_tokenizer(config, name, note=note)
    template = open_template(config, tokenizer, note=note)
    return preprocess_config(config, tokenizer, template)


def rows(
    config: Config, settings: PreprocessConfig, limit: int | None
) -> Iterator[tuple[str, PreprocessedRow]]:
    """Yield every row of every dataset in order, as (dataset, row), the first `limit` of all."""
    every = (
        (name, prepared)
        for name, entry in zip(dataset_names(config.datasets), config.datasets, strict=True)
        for prepared in preprocess(entry, settings)
    )
    return itertools.islice(every, limit)


def examples(config: Config, settings: PreprocessConfig, limit: int) -> Iterator[ExampleView]:
    """Yield the first `limit` rows, token by token, for a page."""
    for name, prepared in rows(config, settings, limit):
        tokens, dropped = prepared.tokens, prepared.dropped
        if tokens is None:
            pieces = [TokenText(prepared.text, [], 0.0)] if prepared.text else []
        else:
            pieces = [TokenText(*token) for token in token_texts(tokens, settings.tokenizer)]
        cut = len(pieces) - _MOST_TOKENS
        yield ExampleView(
            f"{name} row {prepared.row}, line {prepared.line}"
            + (f", without its last {cut:,} tokens" if cut > 0 else "")
            + "".join(f"; untrained: {lost.text}" for lost in prepared.untrained),
            pieces[:_MOST_TOKENS],
            None if dropped is None else f"dropped: {dropped.text}",
        )


def data_report(
    config: Config, settings: PreprocessConfig, columns: Sequence[str] = ()
) -> dict[str, Any]:
    """Report on the data that a run of this config trains, on one device."""
    with TokenizeProgress(quiet=not shows_notes()) as progress:
        dataset, held_out = open_sides(
            config, settings.tokenizer, settings.template, progress=progress, refuse=False
        )
    batch_size = config.global_batch_size or (
        config.per_device_train_batch_size * config.gradient_accumulation_steps
    )
    batches = Batches(dataset, batch_size=batch_size, seed=config.seed, packing=config.packing)
    steps = batches.total_steps(config.num_train_epochs, config.max_steps)
    summary = with_drawings(report(dataset, batches, total_steps=steps), config, dataset)
    if columns:
        summary["columns"] = {c: distribution(dataset, config.datasets, c) for c in columns}
    if held_out is not None:
        summary["evaluation"] = held_out_report(dataset, held_out)
    return summary


def held_out_report(train: Dataset, held_out: Dataset) -> dict[str, Any]:
    """Count what is held out for evaluation, and how much of it is trained all the same.

    Datasets of its own come with what is lost of them.
    """
    counts = {
        "examples": len(held_out),
        "also_trained": overlap(train, held_out),
        "nearly_trained": near_overlap(train, held_out),
    }
    split_off = held_out.names == train.names and held_out.sources == train.sources
    return counts if split_off else {**counts, "by_dataset": by_dataset(held_out)}


def with_drawings(summary: Mapping[str, Any], config: Config, train: Dataset) -> dict[str, Any]:
    """Add to a data report what a page draws: histograms, and the targets of the mixture."""
    mixture = with_targets(config, summary["mixture"])
    return {**summary, "histograms": histograms(train), "mixture": mixture}


def with_targets(config: Config, mixture: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to the rows of the mixture the share of the whole epoch that `proportions` asks for.

    A target is a share of its own data set; that data set's share of the epoch is taken as it is.
    Data sets of the same name cannot be told apart there, and get no target.
    """
    names = dataset_names(config.datasets)
    targets = {
        (name, value): share
        for name, entry in zip(names, config.datasets, strict=True)
        if entry.proportions is not None and names.count(name) == 1
        for value, share in entry.proportions.target.items()
    }
    whole: Counter[str] = Counter()
    for row in mixture:
        whole[row["dataset"]] += row["share_after"]
    return [
        {**row, "target": targets[key] * whole[row["dataset"]]}
        if (key := (row["dataset"], row["value"])) in targets
        else row
        for row in mixture
    ]
