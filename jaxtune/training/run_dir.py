"""The directory of a run, here or beside a store: located, and claimed for one run at a time."""

from __future__ import annotations

import contextlib
from pathlib import Path

from jaxtune.cli import note
from jaxtune.config import Config, ConfigError, dump, load
from jaxtune.parallel import processes
from jaxtune.storage import lock, object_store
from jaxtune.storage.atomic_write import write_whole
from jaxtune.training.checkpoint import remote
from jaxtune.training.checkpoint.remote import RemoteSync, fetch_run


def place_of(output_dir: str, *, reading: bool) -> Path:
    """Return where this host writes: `output_dir`, or a folder of its own beside a store."""
    if not object_store.is_url(output_dir):
        return Path(output_dir)
    place = remote.reading if reading else remote.staging
    return place(output_dir, processes.index())


def claim(
    output_dir: str, run_dir: Path, end: contextlib.ExitStack, *, reading: bool
) -> RemoteSync | None:
    """Make the run directory and prove that it can be written, before anything is paid for.

    Keeps other runs out until `end`, unless it is only read. Returns the copy in the store, where
    it lies in one.
    """
    sync = None
    if object_store.is_url(output_dir):
        sync = RemoteSync(output_dir, run_dir, note)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".writable-{processes.index()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"output_dir {run_dir}: cannot be written: {error.strerror}. Choose another."
        ) from None
    if not reading and (processes.is_first() or sync is not None):
        end.enter_context(lock.held(run_dir, note))
    if sync is not None:
        end.callback(sync.close)
        if reading:
            sync.look()
        else:
            sync.claim()
        note(f"output_dir: {output_dir}, by way of {run_dir}")
    return sync


def write_config(path: Path, config: Config) -> None:
    try:
        write_whole(path, dump(config))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written: {error.strerror}. Free some space or mend what refuses "
            "it, then run the same command again."
        ) from None


def fetched(name: str, step: int | None = None, *, checkpoint: bool = True) -> str:
    """A run in a store, or one of its checkpoints, as a folder here; any other name as it is.

    A model's folder in a store is another name: what opens it fetches it.
    """
    if not object_store.is_url(name):
        return name
    run, _, number = name.rstrip("/").rpartition("/checkpoints/")
    if run and number.isdigit():
        _, step = checkpoint_of(Path("checkpoints", number), step)
        return str(fetch_run(run, step=step) / "checkpoints" / number)
    if not object_store.find(object_store.join(name, "config.yaml")):
        return name
    return str(fetch_run(name, step=step, checkpoint=checkpoint))


def checkpoint_of(source: Path, step: int | None = None) -> tuple[Path, int | None]:
    """RUN/checkpoints/STEP -> RUN and STEP; anything else as it is."""
    if source.parent.name != "checkpoints" or not source.name.isdigit():
        return source, step
    if step not in (None, int(source.name)):
        raise ConfigError(f"{source}: is step {source.name}, but --step is {step}. Drop one.")
    return source.parent.parent, int(source.name)


def is_checkpoint(name: str) -> bool:
    """Return True if `name` is RUN/checkpoints/STEP."""
    run_dir, step = checkpoint_of(Path(name))
    return step is not None and (run_dir / "config.yaml").is_file()


def unexported(name: str) -> bool:
    """Return True if `name` is a run directory here that has checkpoints and no exported model."""
    folder = Path(name)
    return (folder / "checkpoints").is_dir() and not (folder / "hf" / "config.json").is_file()


def run_config(run_dir: Path, flags: Config) -> Config:
    """The run's config with the fields that were given as flags."""
    config = load(run_dir / "config.yaml")
    return config.model_copy(update={name: getattr(flags, name) for name in flags.model_fields_set})
