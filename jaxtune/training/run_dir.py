"""The directory of a run, here or beside a store: found, claimed for one run at a time."""

from __future__ import annotations

import contextlib
from pathlib import Path

from jaxtune.cli import note
from jaxtune.config import Config, ConfigError, dump
from jaxtune.parallel import processes
from jaxtune.storage import lock, object_store
from jaxtune.storage.atomic_write import write_whole
from jaxtune.training.checkpoint import remote
from jaxtune.training.checkpoint.remote import Mirror


def place_of(output_dir: str, *, reading: bool) -> Path:
    """Return where this host writes: `output_dir`, or a folder of its own beside a store."""
    if not object_store.is_url(output_dir):
        return Path(output_dir)
    place = remote.reading if reading else remote.staging
    return place(output_dir, processes.index())


def claim(
    output_dir: str, run_dir: Path, end: contextlib.ExitStack, *, reading: bool
) -> Mirror | None:
    """Make the run directory and prove that it can be written, before anything is paid for.

    Keeps other runs out until `end`, unless it is only read. Returns the copy in the store, where
    it lies in one.
    """
    mirror = None
    if object_store.is_url(output_dir):
        mirror = Mirror(output_dir, run_dir, note)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".writable-{processes.index()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"output_dir {run_dir}: cannot be written: {error.strerror}. Choose another."
        ) from None
    if not reading and (processes.is_first() or mirror is not None):
        end.enter_context(lock.held(run_dir, note))
    if mirror is not None:
        end.callback(mirror.close)
        if reading:
            mirror.look()
        else:
            mirror.claim()
        note(f"output_dir: {output_dir}, by way of {run_dir}")
    return mirror


def write_config(path: Path, config: Config) -> None:
    try:
        write_whole(path, dump(config))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written: {error.strerror}. Free some space or mend what refuses "
            "it, then run the same command again."
        ) from None
