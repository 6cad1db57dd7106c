"""Write one self-contained HTML page for a run: curves, data, examples, answers, how to repeat.

    python -m jaxtune.report RUN_DIR [--evaluation FILE.json ...] [--card] [--png]

Needs no model and no device. Reads RUN_DIR/metrics.jsonl, samples.jsonl, config.yaml and
evaluation.json, and the data that the config names; writes RUN_DIR/report.html. The run may still
be going. Flags overrule the run's config: `--dataset FILE` where the data has moved.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pydantic import Field

from jaxtune import cli
from jaxtune.config import Config
from jaxtune.reporting.files import EXAMPLES

if TYPE_CHECKING:
    from jaxtune.api.report import ReportResult


class ReportOptions(cli.Options):
    run_dir: str | None = Field(
        None, description="the output_dir of a training run; default: output_dir"
    )
    evaluation: tuple[str, ...] = Field(
        (),
        description="files that 'evaluate --json' printed; shown with their answers; default: "
        "RUN_DIR/evaluation.json, if it is there",
    )
    card: bool = Field(
        False, description="also puts the last evaluation into the model card, RUN_DIR/hf/README.md"
    )
    examples: int = Field(EXAMPLES, ge=0, description="rows of the data to show token by token")
    columns: tuple[str, ...] = Field(
        (), description="columns of the data whose values are counted, e.g. category"
    )
    html: str | None = Field(None, description="FILE to write; default RUN_DIR/report.html")
    png: bool = Field(
        False, description="also RUN_DIR/loss.png; needs pip install 'jaxtune[report]'"
    )

    @classmethod
    def positional(cls) -> tuple[str, ...]:
        return ("run_dir",)


def run(config: Config, options: ReportOptions | None = None) -> ReportResult:
    """Write the page. Raises `ConfigError` and `DataError`; data that cannot be read is left out,
    and the page says why."""
    from jaxtune.api.report import report

    return report(config, **dict(options or ReportOptions()))


def main(argv: list[str] | None = None) -> int:
    return cli.execute("report", __doc__, ReportOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
