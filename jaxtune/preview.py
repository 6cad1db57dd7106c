"""Shows exactly what would be trained: examples with trained tokens marked, then the data report.

    python -m jaxtune.preview --dataset FILE --tokenizer_name FOLDER

Needs no model and no device. `--json` prints one object per example, dropped rows included;
`--stats` the report alone, with `--json` as one object.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from jaxtune import command
from jaxtune.config import Config, ConfigError

if TYPE_CHECKING:
    from jaxtune.data.prepare import Prepared, Settings

_SHOWN = 3


class PreviewOptions(command.Options):
    examples: int | None = Field(
        None, ge=0, description="how many to show; default 3, with --json all"
    )
    stats: bool = Field(False, description="the data report only")
    as_json: bool = Field(
        False, alias="json", description="one object per example; with --stats the report"
    )


class Result(NamedTuple):
    """`report` is None where only examples were asked for (`--json` without `--stats`)."""

    report: Mapping[str, Any] | None


def run(config: Config, options: PreviewOptions | None = None) -> Result:
    """Prints to stdout. Raises `ConfigError` and `DataError`."""
    options = options or PreviewOptions()
    name = config.tokenizer_name or config.model_name_or_path
    if name is None:
        raise ConfigError("tokenizer_name is not set. Give --tokenizer_name FOLDER, or a model.")
    if not config.datasets:
        raise ConfigError("dataset is not set. Give --dataset FILE, or datasets in the config.")
    from jaxtune.data.prepare import Settings

    tokenizer = command.open_tokenizer(config, name)
    template = command.open_template(config, tokenizer)
    settings = Settings(tokenizer, template, config.train_on, config.max_length, config.truncation)
    if options.as_json and not options.stats:
        for entry_name, prepared in _rows(config, settings, options.examples):
            print(json.dumps(_as_object(entry_name, prepared), ensure_ascii=False))
        return Result(None)
    report = _report(config, settings)
    if options.as_json:
        print(json.dumps(report, ensure_ascii=False))
        return Result(report)
    if not options.stats:
        _show(config, settings, _SHOWN if options.examples is None else options.examples)
    from jaxtune.draw.terminal import show_report

    show_report(report, file=sys.stdout)
    return Result(report)


def main(argv: list[str] | None = None) -> int:
    description = (__doc__ or "").split("\n\n")[0]
    return command.execute("preview", description, PreviewOptions, run, argv)


def _rows(config: Config, settings: Settings, limit: int | None) -> Iterator[tuple[str, Prepared]]:
    """Every row of every dataset in order, as (dataset, row), the first `limit` of all."""
    from jaxtune.data.prepare import dataset_name, prepare

    rows = (
        (dataset_name(entry), prepared)
        for entry in config.datasets
        for prepared in prepare(entry, settings)
    )
    return itertools.islice(rows, limit)


def _as_object(name: str, prepared: Prepared) -> dict[str, Any]:
    """The shape that `interface.md` fixes: the whole example, unshifted and unpacked."""
    tokens, dropped = prepared.tokens, prepared.dropped
    return {
        "dataset": name,
        "row": prepared.row,
        "text": prepared.text,
        "input_ids": [] if tokens is None else tokens.ids.tolist(),
        "trained": [] if tokens is None else tokens.weights.tolist(),
        "dropped": None if dropped is None else ": ".join(filter(None, dropped)),
    }


def _report(config: Config, settings: Settings) -> dict[str, Any]:
    from jaxtune.data.doctor import report
    from jaxtune.data.pipeline import Batches, open_dataset, split

    dataset = open_dataset(
        config.datasets,
        tokenizer=settings.tokenizer,
        template=settings.template,
        train_on=config.train_on,
        max_length=config.max_length,
        truncation=config.truncation,
    )
    if config.eval_split:
        dataset, _ = split(dataset, config.eval_split, seed=config.seed)
    batches = Batches(
        dataset,
        batch_size=config.per_device_train_batch_size,
        seed=config.seed,
        packing=config.packing,
    )
    return report(dataset, batches)


def _show(config: Config, settings: Settings, count: int) -> None:
    """Examples for a person: in colour on a terminal, with `[[ ]]` elsewhere."""
    from jaxtune.data.encode import runs
    from jaxtune.draw.terminal import marked, printable

    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for name, prepared in _rows(config, settings, count):
        print(f"--- {printable(name)} row {prepared.row}, line {prepared.line}")
        if prepared.dropped is not None:
            reason = ": ".join(filter(None, prepared.dropped))
            print(f"dropped: {printable(reason)}")
        if prepared.tokens is not None:
            print(marked(runs(prepared.tokens, settings.tokenizer), color=color))
        elif prepared.text:
            print(printable(prepared.text))
        print()


if __name__ == "__main__":
    sys.exit(main())
