"""Shows exactly what would be trained: examples with trained tokens marked, then the data report.

    python -m jaxtune.preview --dataset FILE --tokenizer_name FOLDER

Needs no model and no device. `--json` prints one object per example, dropped rows included;
`--stats` the report alone, with `--json` as one object; `--html FILE` writes both as a page.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from jaxtune import command
from jaxtune.config import Config, ConfigError

if TYPE_CHECKING:
    from jaxtune.data.prepare import Prepared, Settings

_SHOWN, _ON_PAGE = 3, 50  # examples by default


class PreviewOptions(command.Options):
    examples: int | None = Field(
        None, ge=0, description="how many to show; default 3, with --html 50, with --json all"
    )
    html: str | None = Field(
        None, description="FILE for a page of examples, token by token, and the report"
    )
    stats: bool = Field(False, description="the data report only")
    columns: tuple[str, ...] = Field(
        (), description="columns of the data whose values the report counts, e.g. category"
    )
    as_json: bool = Field(
        False, alias="json", description="one object per example; with --stats the report"
    )


class Result(NamedTuple):
    """`report` is None where only examples were asked for (`--json` without `--stats`)."""

    report: Mapping[str, Any] | None


def run(config: Config, options: PreviewOptions | None = None) -> Result:
    """Prints to stdout. Raises `ConfigError` and `DataError`."""
    from jaxtune.data.asked import open_template, open_tokenizer

    options = options or PreviewOptions()
    name = config.tokenizer_name or config.model_name_or_path
    if name is None:
        raise ConfigError("tokenizer_name is not set. Give --tokenizer_name FOLDER, or a model.")
    if not config.datasets:
        raise ConfigError("dataset is not set. Give --dataset FILE, or datasets in the config.")
    from jaxtune.data.prepare import Settings

    tokenizer = open_tokenizer(config, name, note=command.note)
    template = open_template(config, tokenizer, note=command.note)
    settings = Settings(tokenizer, template, config.train_on, config.max_length, config.truncation)
    if options.as_json and not options.stats:
        for entry_name, prepared in _rows(config, settings, options.examples):
            print(json.dumps(_as_object(entry_name, prepared), ensure_ascii=False))
        return Result(None)
    report = _report(config, settings, options.columns)
    if options.html is not None:
        count = _ON_PAGE if options.examples is None else options.examples
        _write_page(Path(options.html), config, settings, report, count)
    if options.as_json:
        print(json.dumps(report, ensure_ascii=False))
        return Result(report)
    if not options.stats and options.html is None:
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


def _report(config: Config, settings: Settings, columns: Sequence[str]) -> dict[str, Any]:
    from jaxtune.data.asked import open_sides
    from jaxtune.data.doctor import distribution, near_overlap, overlap, report
    from jaxtune.data.pipeline import Batches
    from jaxtune.draw.progress import Tokenising

    with Tokenising() as progress:
        dataset, held_out = open_sides(
            config, settings.tokenizer, settings.template, progress=progress
        )
    rows = config.global_batch_size or (
        config.per_device_train_batch_size * config.gradient_accumulation_steps
    )
    batches = Batches(dataset, batch_size=rows, seed=config.seed, packing=config.packing)
    steps = batches.total_steps(config.num_train_epochs, config.max_steps)
    found = report(dataset, batches, total_steps=steps)
    if columns:
        found["columns"] = {c: distribution(dataset, config.datasets, c) for c in columns}
    if held_out is not None:
        found["evaluation"] = {
            "examples": len(held_out),
            "also_trained": overlap(dataset, held_out),
            "nearly_trained": near_overlap(dataset, held_out),
        }
    return found


def _show(config: Config, settings: Settings, count: int) -> None:
    """Examples for a person: in colour on a terminal, with `[[ ]]` elsewhere."""
    from jaxtune.data.encode import runs
    from jaxtune.draw.terminal import marked, printable

    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for name, prepared in _rows(config, settings, count):
        print(f"--- {printable(name)} row {prepared.row}, {printable(prepared.where)}")
        if prepared.dropped is not None:
            reason = ": ".join(filter(None, prepared.dropped))
            print(f"dropped: {printable(reason)}")
        if prepared.tokens is not None:
            print(marked(runs(prepared.tokens, settings.tokenizer), color=color))
        elif prepared.text:
            print(printable(prepared.text))
        print()


def _write_page(
    file: Path, config: Config, settings: Settings, report: Mapping[str, Any], count: int
) -> None:
    from jaxtune.data.encode import token_texts
    from jaxtune.draw.page import Piece, Shown, page

    def shown(name: str, prepared: Prepared) -> Shown:
        tokens, dropped = prepared.tokens, prepared.dropped
        if tokens is None:
            pieces = [Piece(prepared.text, [], 0.0)] if prepared.text else []
        else:
            pieces = [Piece(*found) for found in token_texts(tokens, settings.tokenizer)]
        return Shown(
            f"{name} row {prepared.row}, line {prepared.line}",
            pieces,
            None if dropped is None else f"dropped: {': '.join(filter(None, dropped))}",
        )

    examples = (shown(*row) for row in _rows(config, settings, count))
    names = ", ".join(report["by_dataset"])
    title = f"{names} as trained with template {settings.template.name}"
    try:
        file.write_text(page(title, examples, report), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"html {file}: cannot be written: {error.strerror}.") from None
    command.note(f"written: {file}")


if __name__ == "__main__":
    sys.exit(main())
