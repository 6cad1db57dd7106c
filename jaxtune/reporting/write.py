"""OUT/report.html: a run directory and its data, drawn."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune import __version__
from jaxtune.cli import note
from jaxtune.config import Config, ConfigError
from jaxtune.data.dataset import Dataset
from jaxtune.data.preprocess import PreprocessConfig
from jaxtune.reporting.data import examples, with_drawings
from jaxtune.reporting.files import EXAMPLES, RunFiles, read_run
from jaxtune.reporting.html.data_page import ExampleView, data_page
from jaxtune.reporting.html.run_page import RunPage, run_page
from jaxtune.reporting.model_card import with_evaluation
from jaxtune.storage.atomic_write import write_whole

NAME = "report.html"


def write_page(
    file: Path,
    run: RunFiles,
    *,
    data: Mapping[str, Any] | str,
    examples: Iterable[ExampleView] = (),
    evaluations: Sequence[tuple[str, Mapping[str, Any]]] = (),
    base: str | None = None,
) -> None:
    """Write the page of a run; `data` is the data report, or why there is none; `base` the model
    that was tuned.

    Raises: `ConfigError`.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="minutes")
    written = f"Written by jaxtune {__version__}, {now.removesuffix('+00:00')} UTC."
    page = RunPage(run, data, list(examples), evaluations, _commands(run, base), written)
    _write(file, run_page(page))


def write_data_page(
    file: Path, title: str, examples: Iterable[ExampleView], report: Mapping[str, Any]
) -> None:
    """Write the page of a data set. Raises `ConfigError`."""
    _write(file, data_page(title, examples, report))


def write_card(file: Path, evaluation: Mapping[str, Any]) -> None:
    """Put an evaluation into an existing model card. Raises `ConfigError`."""
    try:
        card = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(
            f"card: {file}: cannot be read: {why}. Give a run whose model was exported."
        ) from None
    _write(file, with_evaluation(card, evaluation))


def _write(file: Path, text: str) -> None:
    try:
        write_whole(file, text)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror}.") from None


def after_training(
    run_dir: Path,
    config: Config,
    settings: PreprocessConfig,
    train: Dataset,
    report: Mapping[str, Any],
) -> None:
    """Write the page at the end of a run, with the data report that it has at hand.

    A trained model is worth more than its picture: whatever goes wrong here is only a note.
    """
    try:
        data = with_drawings(report, config, train)
        base = config.model_name_or_path
        shown = examples(config, settings, EXAMPLES)
        write_page(run_dir / NAME, read_run(run_dir), data=data, examples=shown, base=base)
    except Exception as error:
        note(f"report: not written: {type(error).__name__}: {error}")
    else:
        note(f"report: {run_dir / NAME}")


def _commands(run: RunFiles, base: str | None) -> list[tuple[str, str]]:
    """List (what it does, the command) of all that can be done with what is in the folder."""
    if run.config is None:
        return []
    folder, config = str(run.folder), str(run.folder / "config.yaml")
    other = shlex.quote(f"{folder.rstrip('/')}-again")
    anew = _command("train", f"--config {shlex.quote(config)}", f"--output_dir {other}")
    commands = [("The same run again, in another folder:", anew)]
    if (run.folder / "hf").is_dir():
        answers = shlex.quote(str(run.folder / "evaluation.json"))
        evaluate = _command(
            "evaluate",
            f"--config {shlex.quote(config)}",
            f"--model_name_or_path {shlex.quote(str(run.folder / 'hf'))}",
            f"--base {shlex.quote(base or 'BASE')}",
            f"--generate 50 --json > {answers}",
        )
        report = _command("report", shlex.quote(folder), f"--evaluation {answers}", "--card")
        what = "What it answers beside its base, and this page with the answers:"
        commands.append((what, f"{evaluate}\n{report}"))
    return [*commands, ("This page anew:", _command("report", shlex.quote(folder)))]


def _command(name: str, *parts: str) -> str:
    """Write a long command over several lines, as one types it; a short one on its own."""
    lines = [f"python -m jaxtune.{name}", *parts]
    return (" \\\n  " if sum(map(len, lines)) > 80 else " ").join(lines)
