"""The work of `preview`, as values: every example as it would be trained, and the data report."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.cli import note
from jaxtune.config import Config, ConfigError, ConfigSource, load_config
from jaxtune.data.in_memory import dataset_file
from jaxtune.data.preprocess import PreprocessConfig, PreprocessedRow
from jaxtune.data.tokenize import runs
from jaxtune.reporting.data import data_report, examples, open_settings, rows
from jaxtune.reporting.write import write_data_page
from jaxtune.terminal.text import marked, printable, report_text

_SHOWN, _ON_PAGE = 3, 50  # examples by default


class PreviewExample(NamedTuple):
    """A row as it would be trained, whole: neither shifted nor packed.

    `trained[i]` is the loss weight of `input_ids[i]` as a target; `dropped` is the reason why the
    row is not trained, `untrained` why answers of it are only context.
    """

    dataset: str
    row: int
    text: str
    input_ids: list[int]
    trained: list[float]
    dropped: str | None
    untrained: Sequence[str] = ()


class PreviewResult(NamedTuple):
    """A list of examples in order, dropped rows included, and the data report of all the data."""

    examples: list[PreviewExample]
    report: Mapping[str, Any] | None


def preview(
    config: ConfigSource,
    data: Any = None,
    *,
    limit: int | None = None,
    columns: str | Sequence[str] = (),
) -> PreviewResult:
    """Prepare `data`, else the datasets of the config, as training would; print nothing.

    `data` is a list of dicts, a `datasets.Dataset`, a pandas or polars frame, or a path; `limit`
    bounds the examples, not the report; `columns` are those whose values the report counts.

    Raises: `ConfigError`, `DataError`.
    """
    entries = {} if data is None else {"datasets": [{"path": dataset_file(data)}]}
    if limit is not None and limit < 0:
        raise ConfigError(f"limit is {limit}; expected a number of examples from 0, or None.")
    config = load_config(config, **entries)
    settings = open_settings(config, note=note)
    columns = [columns] if isinstance(columns, str) else columns
    shown = [_example(name, prepared) for name, prepared in rows(config, settings, limit)]
    return PreviewResult(shown, data_report(config, settings, columns))


def show_preview(
    config: Config,
    show: Callable[[str], object],
    *,
    examples: int | None,
    html: str | None,
    stats: bool,
    columns: Sequence[str],
    as_json: bool,
) -> PreviewResult:
    """Give `show` what the command prints, an example at a time: data may be larger than memory.

    The result holds no examples, and no report if only examples are shown.
    """
    settings = open_settings(config, note=note)
    if as_json and not stats:
        for name, prepared in rows(config, settings, examples):
            show(json.dumps(_example(name, prepared)._asdict(), ensure_ascii=False))
        return PreviewResult([], None)
    report = data_report(config, settings, columns)
    if html is not None:
        _write_page(
            Path(html), config, settings, report, _ON_PAGE if examples is None else examples
        )
    if as_json:
        show(json.dumps(report, ensure_ascii=False))
        return PreviewResult([], report)
    if not stats and html is None:
        for text in _texts(config, settings, _SHOWN if examples is None else examples):
            show(text)
    show(report_text(report))
    return PreviewResult([], report)


def _example(name: str, prepared: PreprocessedRow) -> PreviewExample:
    tokens, dropped = prepared.tokens, prepared.dropped
    return PreviewExample(
        name,
        prepared.row,
        prepared.text,
        [] if tokens is None else tokens.ids.tolist(),
        [] if tokens is None else tokens.weights.tolist(),
        None if dropped is None else dropped.text,
        [lost.text for lost in prepared.untrained],
    )


def _texts(config: Config, settings: PreprocessConfig, count: int) -> Iterator[str]:
    """Write examples for a person: in colour on a terminal, with `[[ ]]` elsewhere."""
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for name, prepared in rows(config, settings, count):
        lines = [f"--- {printable(name)} row {prepared.row}, {printable(prepared.where)}"]
        if prepared.dropped is not None:
            lines.append(f"dropped: {printable(prepared.dropped.text)}")
        lines += [f"untrained: {printable(lost.text)}" for lost in prepared.untrained]
        if prepared.tokens is not None:
            lines.append(marked(runs(prepared.tokens, settings.tokenizer), color=color))
        elif prepared.text:
            lines.append(printable(prepared.text))
        yield "\n".join([*lines, ""])


def _write_page(
    file: Path, config: Config, settings: PreprocessConfig, report: Mapping[str, Any], count: int
) -> None:
    names = ", ".join(report["by_dataset"])
    title = f"{names} as trained with template {settings.template.name}"
    write_data_page(file, title, examples(config, settings, count), report)
    note(f"written: {file}")
