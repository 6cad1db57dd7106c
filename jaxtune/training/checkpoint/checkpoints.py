"""Checkpoints by Orbax: OUT/checkpoints/STEP with the parts a reader may want alone.

    trained  the trained part of the variables      opt   the optimiser's state
    meta     JSON: step, fingerprint of the data, what else a resumed run must agree with
    digests-HOST.json   what the files were when they were written

Saving is asynchronous and atomic: a step is there whole or not at all, and counts once its digests
are written. One that is no longer what was written is put aside, and the one before it is taken;
where none is left nothing is touched, and a person decides. Older steps are removed only after a
newer one counts. Where the run's place is a store, `remote` copies each step there once it counts
here, and brings back those that are not here. Several hosts share the folder, or a store: then each
has a folder of its own, `remote_shards` moves what it wrote and what it needs, and what counts in
the store counts.

What makes batches (data, tokenizer, template, seed, rows) has one fingerprint; a checkpoint with
another is refused, since its position would mean other examples.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxtune.config import ConfigError
from jaxtune.parallel import processes
from jaxtune.parallel.mesh import put
from jaxtune.storage.object_store import StoreError, join
from jaxtune.training.checkpoint import integrity
from jaxtune.training.checkpoint.integrity import FOLDER, complete_steps
from jaxtune.training.checkpoint.remote import RemoteSync
from jaxtune.training.checkpoint.remote_shards import RemoteShards, Targets, checkpointer, drop
from jaxtune.training.state import TrainState

_DAMAGED, _REMOVED, _FETCHING = "damaged-", ".removed-", ".fetching-"
_SHARES_SECONDS = 600  # for the digests of the other hosts, before older steps are removed

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax narrates; errors are raised


class Checkpoints:
    """The checkpoints of a run that writes them. Every host calls everything; `close` waits for
    what is being written. `keep` newest ones stay, None = all. `sync` copies them to a store;
    then several hosts need `targets` too: shapes with their shardings (`place`), of which each
    fetches what it holds. With `reading` nothing is removed or renamed, since the run may be going
    on; then a `sync` is one that only looks.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        keep: int | None = None,
        sync: RemoteSync | None = None,
        targets: TrainState | None = None,
        reading: bool = False,
    ) -> None:
        self.folder = (run_dir / FOLDER).absolute()
        self._keep, self._sync, self._reading = keep, sync, reading
        self._shards: RemoteShards | None = None  # of several hosts and a store
        self._targets: Targets = {}
        self._latest: int | None = None
        self._sealing: threading.Thread | None = None
        self._failed: BaseException | None = None
        if sync is not None and processes.count() > 1:
            assert targets is not None
            self._shards = RemoteShards(sync)
            self._targets = {"trained": targets.trained, "opt": targets.opt_state}
            self.folder.mkdir(parents=True, exist_ok=True)
            if not reading:
                drop(self.folder, sync.steps)
            self._latest = max(sync.steps, default=None)
            self._checkpointer = checkpointer()
            return
        if not reading:
            with self._explained():
                processes.on_first(self._tidy, "checkpoints")
        self._latest = max(complete_steps(self.folder), default=None)
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())

    def latest(self) -> int | None:
        """The newest step that counts, what is being written aside."""
        return self._latest

    @property
    def where(self) -> str:
        """Describe, for a person, where the newest step lies."""
        if self._sync is None:
            return str(self.folder)
        place = join(self._sync.url, FOLDER)
        if self._latest in self._sync.steps:
            return place
        return f"{self.folder} and not in {place}, which cannot be written now"

    def newest_good(self, note: Callable[[str], None], *, before: int | None = None) -> int | None:
        """The newest step (below `before`) whose files are what was written; None where there is no
        step at all.

        Damaged ones are named by `note` and renamed to damaged-STEP, out of the way. Raises
        `ConfigError` where a file cannot be read, and where all steps are damaged; then none is
        renamed.
        """
        here, there = self._steps_here(), self._steps_there()
        steps = [s for s in sorted(here | there, reverse=True) if before is None or s < before]
        damaged: dict[int, str] = {}  # of those that are here alone
        reasons: list[str] = []
        for step in steps:
            place = self.folder / str(step)
            if step in here:
                if not (reason := self._verify(place)):
                    return self._take(step, damaged, note)
                reasons.append(reason)
                if step in there:
                    self._put_aside({step: reason}, note)
                else:
                    damaged[step] = reason
            if self._sync is not None and step in there:
                if not (reason := self._fetch(step, self._targets)):
                    return self._take(step, damaged, note)
                reasons.append(reason)
                note(
                    f"checkpoint {join(self._sync.url, FOLDER, step)}: is damaged and not used: "
                    f"{reason}. It stays there until another of that step takes its place."
                )
                self._sync.steps.discard(step)
                shutil.rmtree(place, ignore_errors=True)
        if reasons and not self._reading:
            raise ConfigError(self._none_is_good(steps, reasons[0]))
        self._put_aside(damaged, note)
        self._latest = None
        return None

    def _take(self, step: int, damaged: Mapping[int, str], note: Callable[[str], None]) -> int:
        self._put_aside(damaged, note)
        self._latest = step
        return step

    def _none_is_good(self, steps: Collection[int], reason: str) -> str:
        where = str(self.folder)
        if self._sync is not None:
            where = f"{join(self._sync.url, FOLDER)} and {where}"
        which = (
            f"all {len(steps)} checkpoints ({', '.join(map(str, sorted(steps)))}) are"
            if len(steps) > 1
            else f"the only checkpoint, step {min(steps)}, is"
        )
        return (
            f"{where}: {which} damaged ({reason}), so there is nothing to go on from. Remove "
            f"{'them' if len(steps) > 1 else 'it'} to begin anew in this output_dir, or choose "
            "another one."
        )

    def counts(self, step: int) -> bool:
        """Return True if every host sees that step, here or in the store. All call."""
        seen = step in self._steps_here() | self._steps_there()
        return all(processes.gather_texts("seen" if seen else ""))

    def _steps_here(self) -> set[int]:
        """Of these, what is in the store too is fetched where it is needed."""
        only_there = self._sync is not None and self._reading
        return set() if self._shards is not None or only_there else set(complete_steps(self.folder))

    def _steps_there(self) -> set[int]:
        return set() if self._sync is None else set(self._sync.steps)

    def _fetch(self, step: int, targets: Targets) -> str:
        """A step of the store to here, of several hosts to each what it needs of it; what is not
        as it was written, in words."""
        assert self._sync is not None
        here = self.folder / str(step)
        if self._shards is not None:
            return _of_all(functools.partial(self._shards.fetch, step, here, targets))
        self._sync.fetch_step(step, here)
        return self._verify(here)

    def _verify(self, place: Path) -> str:
        """Return the damage that any host finds in its share of the files; empty if all is well."""
        return _of_all(
            functools.partial(
                integrity.verify, place, host=processes.index(), hosts=processes.count()
            )
        )

    def save(
        self, state: TrainState, meta: Mapping[str, Any], *, step: int, best: int | None = None
    ) -> None:
        """Return once the arrays are copied off the devices; writing and hashing go on behind.

        The step `best` stays too, however old. Raises `ConfigError` when the disk cannot hold it,
        or could not hold the one before.
        """
        self.wait()
        self._check_space(state, step)
        with self._explained():
            self._make_room(step)
            if self._shards is not None:
                # One that was made before a checkpoint was read never ends its next save.
                self._checkpointer.close()
                self._checkpointer = checkpointer()
            self._checkpointer.save(
                self.folder / str(step),
                args=ocp.args.Composite(
                    trained=ocp.args.StandardSave(state.trained),
                    opt=ocp.args.StandardSave(state.opt_state),
                    meta=ocp.args.JsonSave({**meta, "step": step}),
                ),
            )
        seal = functools.partial(self._seal, step, best)
        self._sealing = threading.Thread(target=seal, name="jaxtune-checkpoint")
        self._sealing.start()

    def _seal(self, step: int, best: int | None) -> None:
        """In a thread: once all is written, its digests; then older steps go."""
        try:
            self._checkpointer.wait_until_finished()
            place = self.folder / str(step)
            if self._shards is not None and self._sync is not None:
                self._shards.put(step, place)
                self._latest = step
                try:
                    self._remove_older(best)
                except StoreError as error:
                    self._sync.failed(f"that steps before {step} are gone", error)
                drop(self.folder, self._sync.steps)
                return
            integrity.write(place, host=processes.index(), hosts=processes.count())
            self._latest = step
            self._copy(step, best)
            if not processes.is_first() or self._keep is None:
                return
            deadline = time.monotonic() + _SHARES_SECONDS
            while not integrity.complete(place):
                if time.monotonic() > deadline:
                    return  # nothing is removed for a step that does not count
                time.sleep(0.1)
            counting = sorted(complete_steps(self.folder))
            self._remove(old for old in counting[: -self._keep] if old != best)
        except BaseException as error:  # raised by `wait`, in the thread that can answer it
            self._failed = error

    def _copy(self, step: int, best: int | None) -> None:
        """To the store, where there is one; older ones there go only once this one counts there."""
        if self._sync is None:
            return
        try:
            self._sync.put_step(step)
            for missed in sorted(set(complete_steps(self.folder)) - self._sync.steps):
                self._sync.put_step(missed)
            self._remove_older(best)
        except StoreError as error:
            self._sync.failed(f"step {step}", error)

    def _remove_older(self, best: int | None) -> None:
        """In the store, by host 0; every host knows which steps are left."""
        assert self._sync is not None
        counting = sorted(self._sync.steps)
        for old in counting[: -self._keep] if self._keep else ():
            if old == best:
                continue
            if processes.is_first():
                self._sync.remove_step(old)
            self._sync.steps.discard(old)

    def _make_room(self, step: int) -> None:
        """Remove a `step` that lies in the way, of an earlier run that went on from before."""
        remove = functools.partial(self._remove, [step])
        if self._shards is None or self._sync is None:
            processes.on_first(remove, "before saving")
            return
        remove()
        processes.on_first(functools.partial(self._sync.remove_step, step), "before saving")
        self._sync.steps.discard(step)

    def _check_space(self, state: TrainState, step: int) -> None:
        """Asked before writing: a disk that fills up half way fails in a hundred lines. A folder
        that hosts share takes the parts of all of them."""
        shards = (s for leaf in jax.tree.leaves(state) for s in leaf.addressable_shards)
        needed = sum(shard.data.nbytes for shard in shards if shard.replica_id == 0)
        if self._shards is None:
            needed = sum(map(int, processes.gather_texts(str(needed))))
        free = shutil.disk_usage(self.folder).free
        full = "" if free >= needed else (
            f"{self.folder}: step {step} needs {needed / 1e6:,.1f} MB and the disk has "
            f"{free / 1e6:,.1f} MB free. {self._advice()}"
        )  # fmt: skip
        if reasons := [text for text in processes.gather_texts(full) if text]:
            raise ConfigError(reasons[0])

    def _advice(self) -> str:
        latest = self.latest()
        return "Free some space, then run the same command: it goes on " + (
            f"from step {latest}, which is intact." if latest is not None else "from the beginning."
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise `ConfigError` for a failure while writing: Orbax's threads raise anything.

        `StoreError` stays one, and says where the same command goes on from.
        """
        try:
            yield
        except StoreError as error:
            restart = "the beginning" if self._latest is None else f"step {self._latest}"
            raise StoreError(
                f"{error} A checkpoint could not be put there. The same command goes on from "
                f"{restart}.",
                passes=error.passes,
            ) from error
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                f"{self.folder}: a checkpoint could not be written: {reason}. {self._advice()}"
            ) from error

    def restore(self, step: int, abstract: TrainState, shardings: TrainState) -> TrainState:
        """The whole state, each array straight into its sharding."""
        targets = place(abstract, shardings)
        restored = _read(
            self.folder / str(step),
            trained=ocp.args.StandardRestore(targets.trained),
            opt=ocp.args.StandardRestore(targets.opt_state),
        )
        position = put(np.asarray(step, np.int32), shardings.step)
        return TrainState(position, restored["trained"], restored["opt"])

    def restore_trained(self, step: int, abstract: TrainState, shardings: TrainState) -> Any:
        """The trained variables alone. Raises `ConfigError` for a step that is damaged."""
        here = self.folder / str(step)
        targets = place(abstract.trained, shardings.trained)
        # Of a step in parts a host may have some of the files: what it went on from.
        if self._shards or (self._sync is not None and not integrity.complete(here)):
            reason = self._fetch(step, {"trained": targets})
        else:
            reason = self._verify(here)
        if reason:
            raise ConfigError(
                f"{here}: is damaged: {reason}. Set load_best_model_at_end false to export the "
                "last step."
            )
        return _read(self.folder / str(step), trained=ocp.args.StandardRestore(targets))["trained"]

    def meta(self, step: int) -> dict[str, Any]:
        place = self.folder / str(step)
        return _meta(_read(place, meta=ocp.args.JsonRestore()), place, _NEEDED)

    def wait(self) -> None:
        """Until what is being written counts; raises what `save` raises."""
        if self._sealing is not None:
            self._sealing.join()
            self._sealing = None
        if self._failed is not None:
            error, self._failed = self._failed, None
            with self._explained():
                raise error

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    # -- the folder, by host 0 -------------------------------------------------------------------

    def _tidy(self) -> None:
        """Make the folder, and remove what killed runs left: parts of steps, steps half removed,
        and those that were never finished."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            unfinished = path.name.isdigit() and not integrity.complete(path)
            left = path.name.startswith((_REMOVED, _FETCHING))
            if ".orbax-checkpoint-tmp" in path.name or left or unfinished:
                shutil.rmtree(path, ignore_errors=True)

    def _put_aside(self, damaged: Mapping[int, str], note: Callable[[str], None]) -> None:
        """Step -> what is damaged of it."""
        for step, reason in damaged.items():
            if self._reading and not (self.folder / str(step)).exists():
                continue  # the run that is going on has removed it
            now = f" It is now {_DAMAGED}{step}; remove that folder when it is of no more use."
            note(
                f"checkpoint {self.folder / str(step)}: is damaged and not used: {reason}."
                + ("" if self._reading else now)
            )
            if not self._reading:
                processes.on_first(functools.partial(self._rename, step), "damaged")

    def _rename(self, step: int) -> None:
        target = self.folder / f"{_DAMAGED}{step}"
        shutil.rmtree(target, ignore_errors=True)
        os.replace(self.folder / str(step), target)

    def _remove(self, steps: Any) -> None:
        """By another name first: a step is never there in part."""
        for step in steps:
            path = self.folder / str(step)
            gone = path.with_name(f"{_REMOVED}{step}")
            if path.exists():
                shutil.rmtree(gone, ignore_errors=True)
                os.replace(path, gone)
                shutil.rmtree(gone, ignore_errors=True)


def place(abstract: Any, shardings: Any) -> Any:
    """Shapes with their shardings: what a restore is asked for."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )


def _of_all(look: Callable[[], str]) -> str:
    """Return what `look` finds on any host, the same on all; empty where all is well.

    Raises `ConfigError` on all where one cannot look.
    """
    try:
        difference, failed = look(), ""
    except ConfigError as error:
        difference, failed = "", str(error)
    if reasons := [text for text in processes.gather_texts(failed) if text]:
        raise ConfigError(reasons[0])
    return next((text for text in processes.gather_texts(difference) if text), "")


def _read(folder: Path, **parts: Any) -> Any:
    """Raise `ConfigError`: Orbax says in many ways that it cannot read what was written."""
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(folder, args=ocp.args.Composite(**parts))
    except Exception as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise ConfigError(
            f"{folder}: is whole, but cannot be read as a checkpoint of this run: {reason}. Choose "
            "another step, or another output_dir."
        ) from error


_META = {"step": int, "total_steps": int, "fingerprint": str, "held_out": str}
_NEEDED = ("step", "total_steps", "fingerprint")
_META_PARTS = ("lora", "base", "part", "standing")


def _meta(restored: Any, folder: Path, needed: Collection[str] = ("step",)) -> dict[str, Any]:
    """Return a checkpoint's meta, after a check that its values have the types that are written."""
    meta = restored["meta"]
    kinds = isinstance(meta, dict) and all(
        type(meta.get(name)) is kind
        for name, kind in _META.items()
        if name in meta or name in needed
    )
    if not kinds or not all(isinstance(meta.get(name, {}), dict) for name in _META_PARTS):
        raise ConfigError(f"{folder}: its meta is not what was written. Choose another step.")
    return dict(meta)


# -- for those who only read -----------------------------------------------------------------------


def read_meta(
    run_dir: Path, step: int | None = None, *, note: Callable[[str], None] = lambda message: None
) -> dict[str, Any]:
    """Read the meta of the checkpoint of `step`, or of the newest good one; its "step" is which.

    `note` is called for those that are damaged and passed over.
    """
    place = _find(run_dir, step, note)
    return _meta(_read(place, meta=ocp.args.JsonRestore()), place)


def restore_trained(
    run_dir: Path, abstract: Any, shardings: Any, *, step: int | None = None
) -> Any:
    """Restore the trained part of the variables of `step`, or of the newest good one."""
    folder = _find(run_dir, step)
    targets = ocp.args.StandardRestore(place(abstract, shardings))
    return _read(folder, trained=targets)["trained"]


def _find(
    run_dir: Path, step: int | None, note: Callable[[str], None] = lambda message: None
) -> Path:
    """The folder of the step that is meant. Raises `ConfigError` when it is not there or damaged;
    without a `step` damaged ones are passed over as long as an older one is good.
    """
    folder = (run_dir / FOLDER).absolute()
    if not folder.is_dir():
        raise ConfigError(f"{run_dir}: no checkpoints; expected {folder}.")
    steps = sorted(complete_steps(folder), reverse=True)
    if not steps or step not in (None, *steps):
        known = ", ".join(map(str, reversed(steps))) or "none"
        raise ConfigError(f"{folder}: no checkpoint of step {step}; there are: {known}.")
    message = ""
    for candidate in steps if step is None else [step]:
        stamp = (folder / str(candidate) / integrity.MARK).stat().st_mtime_ns
        if not (what := _verify(folder / str(candidate), stamp)):
            if message:
                note(f"{message} Step {candidate} is taken instead.")
            return folder / str(candidate)
        message = message or f"{folder / str(candidate)}: is damaged: {what}."
    others = ", ".join(str(other) for other in reversed(steps) if other != step)
    raise ConfigError(f"{message} Choose another step with --step; there are: {others or 'none'}.")


@functools.lru_cache(maxsize=4)
def _verify(folder: Path, stamp: int) -> str:
    """`digests.damage`, once for the two reads that follow each other."""
    return integrity.verify(folder)
