"""One self-contained HTML page for a run directory: curves, data, examples, answers, how to repeat.

    python -m jaxtune.report RUN_DIR [--evaluation FILE.json ...] [--card] [--png]

Needs no model and no device. Reads RUN_DIR/metrics.jsonl, samples.jsonl, config.yaml and
evaluation.json, and the data that the config names; writes RUN_DIR/report.html. The run may still
be going. Flags overrule the run's config: `--dataset FILE` where the data has moved.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from jaxtune import cli
from jaxtune.cli import note
from jaxtune.config import Config, ConfigError, DataError, ModelError
from jaxtune.reporting.write import EXAMPLES, NAME
from jaxtune.storage import object_store

if TYPE_CHECKING:
    from jaxtune.reporting.files import RunFiles
    from jaxtune.reporting.html.example import Shown


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


class Result(NamedTuple):
    """`picture` is None without `png`, `card` without `card`."""

    page: Path
    picture: Path | None
    card: Path | None = None


def run(config: Config, options: ReportOptions | None = None) -> Result:
    """Raises `ConfigError` and `DataError`; data that cannot be read is said on the page."""
    from jaxtune.reporting.files import read_evaluation, read_run
    from jaxtune.reporting.write import write_card, write_page
    from jaxtune.training.initial_weights import fetched

    # 1. The run, and what it is asked to be shown with.
    options = options or ReportOptions()
    run_dir = options.run_dir or config.output_dir
    if run_dir is None:
        raise ConfigError("RUN_DIR is missing. Usage: jaxtune report RUN_DIR [--flags]")
    files = read_run(Path(fetched(run_dir, checkpoint=False)))
    evaluations = [(Path(name).name, read_evaluation(Path(name))) for name in options.evaluation]
    if not evaluations:
        evaluations = _lying_there(files)
    if options.card and not evaluations:
        raise ConfigError("card: there is no evaluation to put there. Give --evaluation FILE.json.")

    # 2. Its data, where it still is.
    data, examples, base = _data(config, options, files)

    # 3. The page.
    page = files.folder / NAME if options.html is None else Path(options.html)
    write_page(page, files, data=data, examples=examples, evaluations=evaluations, base=base)
    note(f"written: {page}")
    picture = None
    if options.png:
        from jaxtune.reporting.loss_png import save_loss

        picture = files.folder / "loss.png"
        save_loss(picture, files.folder.resolve().name, files.train, files.evals)
        note(f"written: {picture}")
    card = None
    if options.card:
        card = files.folder / "hf" / "README.md"
        write_card(card, evaluations[-1][1])
        note(f"written: {card}")
    if object_store.is_url(run_dir):
        page_there = page if options.html is None else None
        for written in filter(None, (page_there, picture, card)):
            there = written.relative_to(files.folder).parts
            object_store.put(written, object_store.join(run_dir, *there))
            note(f"put: {object_store.join(run_dir, *there)}")
    return Result(page, picture, card)


def main(argv: list[str] | None = None) -> int:
    description = (__doc__ or "").split("\n\n")[0]
    return cli.execute("report", description, ReportOptions, run, argv)


def _lying_there(files: RunFiles) -> list[tuple[str, dict[str, Any]]]:
    """The evaluation in the run directory. Nobody asked for it: that it cannot be read, as while it
    is made, is a note."""
    from jaxtune.reporting.files import EVALUATION, read_evaluation

    file = files.folder / EVALUATION
    if not file.exists():
        return []
    try:
        return [(EVALUATION, read_evaluation(file))]
    except ConfigError as error:
        note(f"evaluation: left out: {error}")
        files.notes.append(f"{EVALUATION} cannot be read, so it is left out here.")
        return []


def _data(
    flags: Config, options: ReportOptions, files: RunFiles
) -> tuple[Mapping[str, Any] | str, list[Shown], str | None]:
    """The data report and the examples, or why there are none; and the base of the run."""
    from jaxtune.reporting.data import data_report, examples, open_settings
    from jaxtune.training.initial_weights import run_config

    if files.config is None:
        return "The run directory has no config.yaml, which would name the data.", [], None
    config = run_config(files.folder, flags)
    rows_per_step = files.starts[-1].get("rows_per_step") if files.starts else None
    if isinstance(rows_per_step, int) and "global_batch_size" not in flags.model_fields_set:
        config = config.model_copy(update={"global_batch_size": rows_per_step})
    try:
        settings = open_settings(config, note=note)
        report = data_report(config, settings, options.columns)
        if not isinstance(rows_per_step, int):
            # How it was batched depends on the devices it ran on, which nothing here says.
            report.pop("packing")
        shown = list(examples(config, settings, options.examples))
        return report, shown, config.model_name_or_path
    except (ConfigError, DataError, ModelError) as error:
        if options.columns:
            raise
        note(f"data: left out: {error}")
        why = f"The data could not be read again, so it is left out here: {error}"
        return why, [], config.model_name_or_path


if __name__ == "__main__":
    sys.exit(main())
