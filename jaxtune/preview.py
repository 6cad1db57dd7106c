"""Shows exactly what would be trained: examples with trained tokens marked, then the data report.

    python -m jaxtune.preview --dataset FILE --tokenizer_name FOLDER

Needs no model and no device. `--json` prints one object per example, dropped rows included;
`--stats` the report alone, with `--json` as one object; `--html FILE` writes both as a page.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from jaxtune import cli
from jaxtune.config import Config, ConfigError
from jaxtune.reporting.data import data_report, examples, open_settings, rows

if TYPE_CHECKING:
    from jaxtune.data.preprocess import Prepared, Settings

_SHOWN, _ON_PAGE = 3, 50  # examples by default


class PreviewOptions(cli.Options):
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
    options = options or PreviewOptions()
    settings = open_settings(config, note=cli.note)
    if options.as_json and not options.stats:
        for entry_name, prepared in rows(config, settings, options.examples):
            print(json.dumps(_as_object(entry_name, prepared), ensure_ascii=False))
        return Result(None)
    report = data_report(config, settings, options.columns)
    if options.html is not None:
        count = _ON_PAGE if options.examples is None else options.examples
        _write_page(Path(options.html), config, settings, report, count)
    if options.as_json:
        print(json.dumps(report, ensure_ascii=False))
        return Result(report)
    if not options.stats and options.html is None:
        _show(config, settings, _SHOWN if options.examples is None else options.examples)
    from jaxtune.terminal.text import show_report

    show_report(report, file=sys.stdout)
    return Result(report)


def main(argv: list[str] | None = None) -> int:
    description = (__doc__ or "").split("\n\n")[0]
    return cli.execute("preview", description, PreviewOptions, run, argv)


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


def _show(config: Config, settings: Settings, count: int) -> None:
    """Examples for a person: in colour on a terminal, with `[[ ]]` elsewhere."""
    from jaxtune.data.tokenize import runs
    from jaxtune.terminal.text import marked, printable

    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for name, prepared in rows(config, settings, count):
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
    from jaxtune.reporting.html.data_page import page

    names = ", ".join(report["by_dataset"])
    title = f"{names} as trained with template {settings.template.name}"
    try:
        file.write_text(page(title, examples(config, settings, count), report), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"html {file}: cannot be written: {error.strerror}.") from None
    cli.note(f"written: {file}")


sys.modules[__name__].__class__ = cli.CommandModule

if __name__ == "__main__":
    sys.exit(main())
