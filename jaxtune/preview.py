"""Show exactly what would be trained: examples with trained tokens marked, then the data report.

    python -m jaxtune.preview --dataset FILE --tokenizer_name FOLDER

Needs no model and no device. `--json` prints one object per example, dropped rows included;
`--stats` the report alone, with `--json` as one object; `--html FILE` writes both as a page.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import Field

from jaxtune import cli
from jaxtune.config import Config

if TYPE_CHECKING:
    from jaxtune.api.preview import PreviewResult


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


def run(
    config: Config,
    options: PreviewOptions | None = None,
    *,
    show: Callable[[str], object] = lambda text: None,
) -> PreviewResult:
    """Preview the data of a config; `show` gets what the command prints, part by part.

    Raises: `ConfigError`, `DataError`.
    """
    from jaxtune.api.preview import show_preview

    return show_preview(config, show, **dict(options or PreviewOptions()))


def main(argv: list[str] | None = None) -> int:
    show = functools.partial(run, show=print)
    return cli.execute("preview", __doc__, PreviewOptions, show, argv)


sys.modules[__name__].__class__ = cli.CommandModule

if __name__ == "__main__":
    sys.exit(main())
