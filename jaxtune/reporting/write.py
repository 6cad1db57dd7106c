"""OUT/report.html: what a run directory and its data say, drawn."""

from __future__ import annotations

import datetime
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune import __version__
from jaxtune.command import note
from jaxtune.config import Config, ConfigError
from jaxtune.reporting.files import RunFiles, read_run

if TYPE_CHECKING:
    from jaxtune.data.pipeline import Dataset
    from jaxtune.data.prepare import Settings
    from jaxtune.draw.example import Shown

NAME = "report.html"
EXAMPLES = 10


def write_page(
    file: Path,
    run: RunFiles,
    *,
    data: Mapping[str, Any] | str,
    examples: Iterable[Shown] = (),
    evaluations: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> None:
    """`data` is the data report, or why there is none. A page that was there before is replaced in
    one step, so that a browser never reads half of one. Raises `ConfigError`."""
    from jaxtune.draw.report import RunPage, run_page

    now = datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="minutes")
    page = run_page(
        RunPage(
            name=run.folder.resolve().name,
            train=run.train,
            evals=run.evals,
            starts=run.starts,
            samples=run.samples,
            evaluations=evaluations,
            data=data,
            examples=examples,
            config=run.config,
            commands=_commands(run),
            notes=run.notes,
            written=f"Written by jaxtune {__version__}, {now.removesuffix('+00:00')} UTC.",
        )
    )
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        unfinished.write_text(page, encoding="utf-8")
        os.replace(unfinished, file)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise ConfigError(f"{file}: cannot be written: {error.strerror}.") from None


def after_training(
    run_dir: Path, config: Config, settings: Settings, train: Dataset, report: Mapping[str, Any]
) -> None:
    """The page at the end of a run, with the data report that it has at hand.

    A trained model is worth more than its picture: whatever goes wrong here is said and forgotten.
    """
    from jaxtune.data.doctor import histograms
    from jaxtune.reporting.data import examples, with_targets

    try:
        data = {
            **report,
            "histograms": histograms(train),
            "mixture": with_targets(config, report["mixture"]),
        }
        shown = examples(config, settings, EXAMPLES)
        write_page(run_dir / NAME, read_run(run_dir), data=data, examples=shown)
    except Exception as error:
        note(f"report: not written: {type(error).__name__}: {error}")
    else:
        note(f"report: {run_dir / NAME}")


def _commands(run: RunFiles) -> list[tuple[str, str]]:
    if run.config is None:
        return []
    folder = shlex.quote(str(run.folder))
    config = shlex.quote(str(run.folder / "config.yaml"))
    found = [
        (
            "The same run again, in another folder:",
            f"python -m jaxtune.train --config {config} --output_dir {folder}-again",
        ),
        ("This page anew:", f"python -m jaxtune.report {folder}"),
    ]
    model = run.folder / "hf"
    if model.is_dir():
        answers = shlex.quote(str(run.folder / "evaluation.json"))
        found.insert(
            1,
            (
                "What it answers beside its base, and this page with the answers:",
                f"python -m jaxtune.evaluate --config {config} --model_name_or_path "
                f"{shlex.quote(str(model))} --base BASE --generate 50 --json > {answers}\n"
                f"python -m jaxtune.report {folder} --evaluation {answers}",
            ),
        )
    return found
