"""The work of `report`: a run directory read back, its data opened again, and the page written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.cli import note
from jaxtune.config import Config, ConfigError, DataError, ModelError
from jaxtune.reporting.data import data_report, examples, open_settings
from jaxtune.reporting.files import EVALUATION, EXAMPLES, RunFiles, read_evaluation, read_run
from jaxtune.reporting.html.data_page import ExampleView
from jaxtune.reporting.loss_png import save_loss
from jaxtune.reporting.write import NAME, write_card, write_page
from jaxtune.storage import object_store
from jaxtune.training.run_dir import fetched, run_config


class ReportResult(NamedTuple):
    """A set of files written; `picture` is None without `png`, `card` without `card`."""

    page: Path
    picture: Path | None
    card: Path | None = None


class _RunData(NamedTuple):
    """A data report or why it is missing, the examples, and the model that was tuned."""

    report: Mapping[str, Any] | str
    examples: Sequence[ExampleView] = ()
    base: str | None = None


def report(
    config: Config,
    *,
    run_dir: str | None = None,
    evaluation: Sequence[str] = (),
    card: bool = False,
    examples: int = EXAMPLES,
    columns: Sequence[str] = (),
    html: str | None = None,
    png: bool = False,
) -> ReportResult:
    """Write the page of the run in `run_dir`, else `config.output_dir`, and what else is wanted."""
    run_dir = run_dir or config.output_dir
    if run_dir is None:
        raise ConfigError("RUN_DIR is missing. Usage: jaxtune report RUN_DIR [--flags]")
    files = read_run(Path(fetched(run_dir, checkpoint=False)))
    evaluations = [(Path(name).name, read_evaluation(Path(name))) for name in evaluation]
    if not evaluations:
        evaluations = _evaluation_of_the_run(files)
    if card and not evaluations:
        raise ConfigError("card: there is no evaluation to put there. Give --evaluation FILE.json.")

    data = _open_data(config, files, examples, columns)
    page = files.folder / NAME if html is None else Path(html)
    write_page(
        page,
        files,
        data=data.report,
        examples=data.examples,
        evaluations=evaluations,
        base=data.base,
    )
    note(f"written: {page}")
    picture = files.folder / "loss.png" if png else None
    if picture is not None:
        save_loss(picture, files.folder.resolve().name, files.train, files.evals)
        note(f"written: {picture}")
    model_card = files.folder / "hf" / "README.md" if card else None
    if model_card is not None:
        write_card(model_card, evaluations[-1][1])
        note(f"written: {model_card}")
    if object_store.is_url(run_dir):
        _upload(run_dir, files.folder, [page if html is None else None, picture, model_card])
    return ReportResult(page, picture, model_card)


def _upload(run_dir: str, folder: Path, written: Sequence[Path | None]) -> None:
    for file in filter(None, written):
        url = object_store.join(run_dir, *file.relative_to(folder).parts)
        object_store.put(file, url)
        note(f"put: {url}")


def _evaluation_of_the_run(files: RunFiles) -> list[tuple[str, dict[str, Any]]]:
    """Read the evaluation in the run directory; one that cannot be read is only a note.

    It was not named by the user, and may just be in the making.
    """
    file = files.folder / EVALUATION
    if not file.exists():
        return []
    try:
        return [(EVALUATION, read_evaluation(file))]
    except ConfigError as error:
        note(f"evaluation: left out: {error}")
        files.notes.append(f"{EVALUATION} cannot be read, so it is left out here.")
        return []


def _open_data(flags: Config, files: RunFiles, count: int, columns: Sequence[str]) -> _RunData:
    """Open the data of the run's config, where it still is."""
    if files.config is None:
        return _RunData("The run directory has no config.yaml, which would name the data.")
    config = run_config(files.folder, flags)
    rows_per_step = files.starts[-1].get("rows_per_step") if files.starts else None
    if isinstance(rows_per_step, int) and "global_batch_size" not in flags.model_fields_set:
        config = config.model_copy(update={"global_batch_size": rows_per_step})
    base = config.model_name_or_path
    try:
        settings = open_settings(config, note=note)
        summary = data_report(config, settings, columns)
        if not isinstance(rows_per_step, int):
            # Batches depend on the devices of the run, and no file there names them.
            summary.pop("packing")
        return _RunData(summary, list(examples(config, settings, count)), base)
    except (ConfigError, DataError, ModelError) as error:
        if columns:
            raise
        note(f"data: left out: {error}")
        reason = f"The data could not be read again, so it is left out here: {error}"
        return _RunData(reason, base=base)
