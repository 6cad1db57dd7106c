"""Checkpoints by Orbax: OUT/checkpoints/STEP with the parts a reader may want alone.

    trained  the trained part of the variables      opt   the optimiser's state
    meta     JSON: step, fingerprint of the data, what else a resumed run must agree with

Saving is asynchronous and atomic: a step is there whole or not at all. What makes batches (data,
tokenizer, template, seed, rows) has one fingerprint; a checkpoint with another is refused, since
its position would mean other examples.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxtune.config import ConfigError
from jaxtune.learn.state import TrainState

FOLDER = "checkpoints"

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax narrates; errors are raised


class Checkpoints:
    """Holds the one open Orbax manager of a run; `close` waits for what is being written."""

    def __init__(self, run_dir: Path, *, keep: int | None = None) -> None:
        self.folder = (run_dir / FOLDER).absolute()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=True,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: Mapping[str, Any], *, step: int) -> None:
        """Returns once the arrays are copied off the devices; writing goes on behind.

        Raises `ConfigError` when the disk cannot hold it, or could not hold the one before.
        """
        self.wait()
        self._check_space(state, step)
        with self._explained():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    trained=ocp.args.StandardSave(state.trained),
                    opt=ocp.args.StandardSave(state.opt_state),
                    meta=ocp.args.JsonSave({**meta, "step": step}),
                ),
            )

    def _check_space(self, state: TrainState, step: int) -> None:
        """Asked before writing: a disk that fills up half way fails in a hundred lines."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.is_fully_addressable)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise ConfigError(
                f"{self.folder}: step {step} needs {needed / 1e6:,.1f} MB and the disk has "
                f"{free / 1e6:,.1f} MB free. {self._advice()}"
            )

    def _advice(self) -> str:
        kept = self.latest()
        return "Free some space, then run the same command: it goes on " + (
            f"from step {kept}, which is intact." if kept is not None else "from the beginning."
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """What goes wrong while writing comes from Orbax's threads, as whatever they raise."""
        try:
            yield
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                f"{self.folder}: a checkpoint could not be written: {reason}. {self._advice()}"
            ) from error

    def restore(
        self, step: int, abstract: TrainState, shardings: TrainState
    ) -> tuple[TrainState, dict[str, Any]]:
        """The whole state, each array straight into its sharding."""
        wanted = place(abstract, shardings)
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                trained=ocp.args.StandardRestore(wanted.trained),
                opt=ocp.args.StandardRestore(wanted.opt_state),
                meta=ocp.args.JsonRestore(),
            ),
        )
        position = jax.device_put(jax.numpy.asarray(step, jax.numpy.int32), shardings.step)
        return TrainState(position, found["trained"], found["opt"]), found["meta"]

    def meta(self, step: int) -> dict[str, Any]:
        found = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        return dict(found["meta"])

    def wait(self) -> None:
        """Until what is being written is there whole; raises what `save` raises."""
        with self._explained():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._explained():
            self._manager.close()


def place(abstract: Any, shardings: Any) -> Any:
    """Shapes with their shardings: what a restore is asked for."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )


def read_meta(run_dir: Path, step: int | None = None) -> dict[str, Any]:
    """What the checkpoint of `step`, or the newest, says of itself; "step" is which it is."""
    with _open(run_dir, step) as (manager, found):
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return dict(manager.restore(found, args=args)["meta"])


@contextlib.contextmanager
def _open(run_dir: Path, step: int | None) -> Iterator[tuple[ocp.CheckpointManager, int]]:
    """A run's checkpoints to read, and the step that is meant."""
    folder = (run_dir / FOLDER).absolute()
    if not folder.is_dir():
        raise ConfigError(f"{run_dir}: no checkpoints; expected {folder}.")
    with ocp.CheckpointManager(folder) as manager:
        steps = sorted(manager.all_steps())
        step = steps[-1] if step is None and steps else step
        if step is None or step not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise ConfigError(f"{folder}: no checkpoint of step {step}; there are: {known}.")
        yield manager, step


def restore_trained(
    run_dir: Path, abstract: Any, shardings: Any, *, step: int | None = None
) -> tuple[Any, dict[str, Any]]:
    """The trained part of the variables, and the meta, of `step` or of the newest checkpoint."""
    with _open(run_dir, step) as (manager, step):
        found = manager.restore(
            step,
            args=ocp.args.Composite(
                trained=ocp.args.StandardRestore(place(abstract, shardings)),
                meta=ocp.args.JsonRestore(),
            ),
        )
    return found["trained"], found["meta"]
