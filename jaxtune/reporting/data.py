"""What a run is trained on, opened from its config: rows as they are trained, and the report."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jaxtune.config import Config, ConfigError

if TYPE_CHECKING:
    from jaxtune.data.preprocess import Prepared, Settings
    from jaxtune.reporting.html.example import Shown

_MOST_TOKENS = 2000  # of an example that a page shows: each costs it some 80 bytes


def open_settings(config: Config, *, note: Callable[[str], None]) -> Settings:
    """How the rows of a run are prepared. Raises `ConfigError` where the config names no tokenizer
    or no data, and `DataError`."""
    from jaxtune.data.open import open_template, open_tokenizer
    from jaxtune.data.preprocess import Settings

    name = config.tokenizer_name or config.model_name_or_path
    if name is None:
        raise ConfigError("tokenizer_name is not set. Give --tokenizer_name FOLDER, or a model.")
    if not config.datasets:
        raise ConfigError("dataset is not set. Give --dataset FILE, or datasets in the config.")
    tokenizer = open_tokenizer(config, name, note=note)
    template = open_template(config, tokenizer, note=note)
    return Settings(tokenizer, template, config.train_on, config.max_length, config.truncation)


def rows(config: Config, settings: Settings, limit: int | None) -> Iterator[tuple[str, Prepared]]:
    """Every row of every dataset in order, as (dataset, row), the first `limit` of all."""
    from jaxtune.data.preprocess import dataset_names, prepare

    every = (
        (name, prepared)
        for name, entry in zip(dataset_names(config.datasets), config.datasets, strict=True)
        for prepared in prepare(entry, settings)
    )
    return itertools.islice(every, limit)


def examples(config: Config, settings: Settings, limit: int) -> Iterator[Shown]:
    """The first `limit` rows, token by token, for a page."""
    from jaxtune.data.tokenize import token_texts
    from jaxtune.reporting.html.example import Piece, Shown

    for name, prepared in rows(config, settings, limit):
        tokens, dropped = prepared.tokens, prepared.dropped
        if tokens is None:
            pieces = [Piece(prepared.text, [], 0.0)] if prepared.text else []
        else:
            pieces = [Piece(*found) for found in token_texts(tokens, settings.tokenizer)]
        cut = len(pieces) - _MOST_TOKENS
        yield Shown(
            f"{name} row {prepared.row}, line {prepared.line}"
            + (f", without its last {cut:,} tokens" if cut > 0 else ""),
            pieces[:_MOST_TOKENS],
            None if dropped is None else f"dropped: {': '.join(filter(None, dropped))}",
        )


def data_report(config: Config, settings: Settings, columns: Sequence[str] = ()) -> dict[str, Any]:
    """The report of `data.doctor` on what a run of this config trains, on one device."""
    from jaxtune.data.dataset import Batches
    from jaxtune.data.open import open_sides
    from jaxtune.data.report.data_report import (
        distribution,
        histograms,
        near_overlap,
        overlap,
        report,
    )
    from jaxtune.terminal.progress import Tokenising

    with Tokenising() as progress:
        dataset, held_out = open_sides(
            config, settings.tokenizer, settings.template, progress=progress
        )
    batch_size = config.global_batch_size or (
        config.per_device_train_batch_size * config.gradient_accumulation_steps
    )
    batches = Batches(dataset, batch_size=batch_size, seed=config.seed, packing=config.packing)
    steps = batches.total_steps(config.num_train_epochs, config.max_steps)
    found = report(dataset, batches, total_steps=steps)
    found["histograms"] = histograms(dataset)
    found["mixture"] = with_targets(config, found["mixture"])
    if columns:
        found["columns"] = {c: distribution(dataset, config.datasets, c) for c in columns}
    if held_out is not None:
        found["evaluation"] = {
            "examples": len(held_out),
            "also_trained": overlap(dataset, held_out),
            "nearly_trained": near_overlap(dataset, held_out),
        }
    return found


def with_targets(config: Config, mixture: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the mixture with the share of the whole epoch that `proportions` asks for.

    A target is a share of its own data set; that data set's share of the epoch is taken as it is.
    Data sets of the same name cannot be told apart there, and get no target.
    """
    from jaxtune.data.preprocess import dataset_names

    names = dataset_names(config.datasets)
    asked = {
        (name, value): share
        for name, entry in zip(names, config.datasets, strict=True)
        if entry.proportions is not None and names.count(name) == 1
        for value, share in entry.proportions.target.items()
    }
    whole: Counter[str] = Counter()
    for row in mixture:
        whole[row["dataset"]] += row["share_after"]
    return [
        {**row, "target": asked[key] * whole[row["dataset"]]}
        if (key := (row["dataset"], row["value"])) in asked
        else row
        for row in mixture
    ]
