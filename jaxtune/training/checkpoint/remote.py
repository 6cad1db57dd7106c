"""A run directory whose place is a store: made on the local disk, copied to its URL as it grows.

An object is there whole or not at all, but a folder is not, and nothing can be renamed. So what
makes a folder count is put last, and removed first: a checkpoint's digests, an export's config.
Files that grow are put anew, before each checkpoint and once a minute. The store is the truth: a
run goes on from what it holds, and a local folder of another run is emptied.

Of several hosts each has a folder of its own and puts what lies there: host 0 all but the others'
shards of checkpoints (`remote_shards`), what they trace, and their stacks. Host 0 lists what the
store holds and publishes it to the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from jaxtune.config import ConfigError
from jaxtune.parallel import processes
from jaxtune.storage import cache_eviction, lock, object_store
from jaxtune.storage.atomic_write import write_whole
from jaxtune.storage.object_store import StoreError, join
from jaxtune.training.checkpoint import integrity
from jaxtune.training.checkpoint.integrity import FOLDER, complete_steps

SECONDS = 60.0  # between two copies of what grows
_IDENTITY = ".run-id"
_CLAIMED, _FINISHED = "claimed", "finished"  # what hosts tell each other
# A folder that is replaced as a whole -> the file without which nobody takes it for one.
_MARKED = {"hf": "config.json", "adapter": "adapter_config.json"}
_PARTS = (FOLDER, *_MARKED, "wandb")  # wandb sends its own, or keeps it to be sent


def staging(url: str, host: int = 0) -> Path:
    """Return the folder where a run of that URL is made before it is copied.

    Each host has its own: hosts may share a machine or a home.
    """
    return object_store.default_folder() / "runs" / _name(url, host)


def reading(url: str, host: int = 0) -> Path:
    """Return the folder where a run of that URL is read, while it may be going on."""
    return object_store.default_folder() / "read" / _name(url, host)


def _name(url: str, host: int) -> str:
    key = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:12]
    return f"{object_store.name_of(url)}-{key}" + (f"-host-{host}" if host else "")


class RemoteSync:
    """The copy of `folder` at `url`. What fails while the run goes on is said by `note`; what fails
    in `claim` and `finish` is raised as `StoreError`.
    """

    def __init__(self, url: str, folder: Path, note: Callable[[str], None]) -> None:
        self.url = url.rstrip("/")
        self.steps: set[int] = set()  # those that count in the store
        self._folder, self._note = folder, note
        self._known: dict[str, tuple[int, int]] = {}  # file -> (size, changed) when it was put
        self._one_at_a_time = threading.RLock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._every_minute, name="jaxtune-remote-sync")
        self._silent = True  # of a failure: the same one is said once
        self._only_reads = False

    # -- the beginning -----------------------------------------------------------------------------

    def claim(self) -> None:
        """Prove that the URL can be read and written, and bring here what the run has there.
        Every host calls; which steps count is what host 0 finds.
        """
        if processes.is_first():
            identity = self._claim()
            processes.publish(
                _CLAIMED, json.dumps({"identity": identity, "steps": sorted(self.steps)})
            )
        else:
            self._join(json.loads(processes.receive(_CLAIMED, 0)))
        self._thread.start()

    def look(self) -> None:
        """Instead of `claim`, for one who only reads a run that may be going on: which steps count.
        Every host calls. Nothing is put but by `put`, and nothing removed."""
        self._only_reads = True
        cache_eviction.use(self._folder)
        if processes.is_first():
            self.steps = set(steps_of(self.url))
            processes.publish(_CLAIMED, json.dumps({"steps": sorted(self.steps)}))
        else:
            self.steps = set(json.loads(processes.receive(_CLAIMED, 0))["steps"])

    def put(self, name: str) -> None:
        """Put one file of the folder into the store. Raises `StoreError`."""
        object_store.put(self._folder / name, join(self.url, name))

    def _join(self, claimed: dict[str, Any]) -> None:
        """Another host: of what lies here it keeps its parts of this run's checkpoints."""
        here = self._folder / _IDENTITY
        same = here.is_file() and here.read_text(encoding="utf-8") == claimed["identity"]
        _empty(self._folder, but=(FOLDER,) if same else ())
        write_whole(here, claimed["identity"])
        self.steps = set(claimed["steps"])
        probe = join(self.url, f".writable-{processes.index()}")
        object_store.put_bytes(b"", probe)
        object_store.remove([probe])

    def _claim(self) -> str:
        mark, here = join(self.url, _IDENTITY), self._folder / _IDENTITY
        known = (
            object_store.read(mark).decode(errors="replace") if object_store.find(mark) else None
        )
        if known is None:
            for name, marker in _MARKED.items():
                _refuse_what_is_no_export(join(self.url, name), marker)
        ours = here.read_text(encoding="utf-8", errors="replace") if here.is_file() else None
        identity = known or secrets.token_hex(16)
        if ours != identity:
            _empty(self._folder)
        object_store.put_bytes(identity.encode(), mark)
        write_whole(here, identity)
        self.steps = set(steps_of(self.url))
        self._tidy()
        local = complete_steps(self._folder / FOLDER) if processes.count() == 1 else []
        if max(local, default=0) <= max(self.steps, default=0):
            fetch_files(self.url, self._folder)
        return identity

    def _tidy(self) -> None:
        """Remove what killed runs left of steps that never counted."""
        place = join(self.url, FOLDER)
        known = {str(step) for step in self.steps}
        left = (
            i for i in object_store.listed(place) if object_store.inside(i.url, place)[0].isdigit()
        )
        object_store.remove(
            i.url for i in left if object_store.inside(i.url, place).split("/")[0] not in known
        )

    # -- while it goes on --------------------------------------------------------------------------

    def put_files(self) -> None:
        """Put the files that have changed since they were put. Raises `StoreError`."""
        with self._one_at_a_time:
            self._put_files()

    def put_step(self, step: int) -> None:
        """The checkpoint of `step`, which counts here already. Raises `StoreError`."""
        place, here = join(self.url, FOLDER, step), self._folder / FOLDER / str(step)
        with self._one_at_a_time:
            self._put_files()  # first: the rows up to this step
            self.steps.discard(step)
            put_marked(here, place, integrity.MARK, contents=False)
            self.steps.add(step)
            self._silent = True

    def remove_step(self, step: int) -> None:
        """By its mark first: it is never there in part."""
        place = join(self.url, FOLDER, step)
        self.steps.discard(step)
        object_store.remove([join(place, integrity.MARK)])
        object_store.remove(item.url for item in object_store.listed(place))

    def fetch_step(self, step: int, folder: Path) -> None:
        if self._only_reads:
            _bring(self.url, step, folder)
        else:
            fetch_step(self.url, step, folder)

    def failed(self, what: str, error: StoreError) -> None:
        """Say that something is not in the store, and that the run goes on; once until it is."""
        if self._silent:
            self._note(
                f"{self.url}: {what} is not there: {error} The run goes on; it is in "
                f"{self._folder}, and is put there as soon as that can be done."
            )
        self._silent = False

    def _every_minute(self) -> None:
        while not self._ended.wait(SECONDS):
            with self._noting_failure("what the run has written since"):
                self._put_files()

    @contextlib.contextmanager
    def _noting_failure(self, what: str) -> Iterator[None]:
        try:
            with self._one_at_a_time:
                yield
        except StoreError as error:
            self.failed(what, error)

    def _put_files(self) -> None:
        """Put the files that have changed since they were put; of a .jsonl file its whole lines."""
        for file in _files(self._folder):
            name = file.relative_to(self._folder).as_posix()
            try:
                now = file.stat()
                if self._known.get(name) == (stamp := (now.st_size, now.st_mtime_ns)):
                    continue
                if file.suffix == ".jsonl":
                    rows = file.read_bytes()
                    object_store.put_bytes(rows[: rows.rfind(b"\n") + 1], join(self.url, name))
                else:
                    object_store.put(file, join(self.url, name))
            except FileNotFoundError:  # it was another one's, for a moment
                continue
            self._known[name] = stamp

    # -- the end -----------------------------------------------------------------------------------

    def finish(self) -> None:
        """Everything, compared with what is there. Raises `StoreError`. No host is done before all
        are."""
        with self._one_at_a_time:
            if processes.is_first():
                for name, marker in _MARKED.items():
                    if (self._folder / name / marker).is_file():
                        put_marked(self._folder / name, join(self.url, name), marker, contents=True)
            if processes.count() == 1:
                for step in sorted(set(complete_steps(self._folder / FOLDER)) - self.steps):
                    self.put_step(step)
            self._put_files()
        processes.publish(_FINISHED)
        for other in set(range(processes.count())) - {processes.index()}:
            processes.receive(_FINISHED, other)
        self._note(f"{self.url}: has all of the run, compared with {self._folder}")

    def close(self) -> None:
        """Put what there is, however the run has ended."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
            with self._noting_failure("what the run wrote last"):
                self._put_files()


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a run directory besides its parts, hidden and unfinished ones left out."""
    for path in sorted(folder.iterdir()):
        if path.name[0] == "." or path.name in _PARTS or path.name.endswith(".tmp"):
            continue
        inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
        yield from (file for file in inside if file.is_file() and not file.is_symlink())


def _empty(folder: Path, *, but: Collection[str] = ()) -> None:
    """Make `folder`, and remove what is in it besides `but` and the lock, which is held."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name in (lock.NAME, *but):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def put_marked(here: Path, place: str, marker: str, *, contents: bool) -> None:
    """A folder that counts with its `marker`, which is removed first and put last; what is there of
    another goes. Compared with what the store holds, by `contents` too. Raises `StoreError`."""
    names = sorted(f.relative_to(here).as_posix() for f in here.rglob("*") if f.is_file())
    object_store.remove([join(place, marker)])
    there = [item.url for item in object_store.listed(place)]
    object_store.remove(url for url in there if object_store.inside(url, place) not in names)
    rest = [name for name in names if name != marker]
    object_store.put_all(here, rest, place)
    if wrong := object_store.unequal(here, rest, place, contents=contents):
        again = "right after it was written. Run the same command again."
        raise StoreError(f"{wrong}, {again}", passes=True)
    object_store.put_all(here, [marker], place)


def put_export(here: Path, url: str) -> None:
    """A model or an adapter. Raises `ConfigError` before it would replace anything else."""
    marker = next(mark for mark in reversed(_MARKED.values()) if (here / mark).is_file())
    _refuse_what_is_no_export(url, marker)
    put_marked(here, url, marker, contents=True)


def _refuse_what_is_no_export(place: str, marker: str) -> None:
    if object_store.listed(place) and not object_store.find(join(place, marker)):
        raise ConfigError(
            f"{place}: holds objects that are no export (no {marker}), and an export replaces the "
            "whole folder. Choose another place."
        )


# -- for those who only read -----------------------------------------------------------------------


def steps_of(url: str) -> list[int]:
    """The steps that count in the store, damaged since or not, in order."""
    place = join(url, FOLDER)
    names = [object_store.inside(item.url, place).split("/") for item in object_store.listed(place)]
    steps = [int(first) for first, *rest in names if rest == [integrity.MARK] and first.isdigit()]
    return sorted(steps)


def fetch_files(url: str, folder: Path) -> None:
    """The files that lie directly in a run directory: config, metrics, samples, starts."""
    direct = [i for i in object_store.listed(url) if "/" not in object_store.inside(i.url, url)]
    object_store.fetch_all(
        (i for i in direct if object_store.name_of(i.url)[0] != "."), url, folder
    )


def fetch_step(url: str, step: int, folder: Path) -> None:
    """A checkpoint into `folder`, which appears whole; what stood there goes."""
    place = join(url, FOLDER, step)
    coming = folder.with_name(f".fetching-{folder.name}")
    shutil.rmtree(coming, ignore_errors=True)
    object_store.fetch_all(object_store.listed(place), place, coming)
    shutil.rmtree(folder, ignore_errors=True)
    coming.rename(folder)


def fetch_run(url: str, *, step: int | None = None, checkpoint: bool = True) -> Path:
    """A run directory to read: its files and, with `checkpoint`, that of `step` or the newest that
    is undamaged. Raises `StoreError` for what is no run, or has no such step."""
    folder = reading(url)
    if not object_store.find(join(url, "config.yaml")):
        raise StoreError(f"{url}: no run there: expected {join(url, 'config.yaml')}.")
    cache_eviction.use(folder)
    fetch_files(url, folder)
    if not checkpoint:
        return folder
    known = steps_of(url)
    (folder / FOLDER).mkdir(exist_ok=True)
    for old in set(complete_steps(folder / FOLDER)) - set(known):
        shutil.rmtree(folder / FOLDER / str(old), ignore_errors=True)
    if step is not None and step not in known:
        there = ", ".join(map(str, known)) or "none"
        raise StoreError(f"{join(url, FOLDER)}: no checkpoint of step {step}; there are: {there}.")
    for candidate in reversed(known) if step is None else [step]:
        here = folder / FOLDER / str(candidate)
        _bring(url, candidate, here)
        if not integrity.verify(here):
            break
    return folder


def _bring(url: str, step: int, here: Path) -> None:
    """A checkpoint to read, fetched where it is not here as it is there now."""
    mark = join(url, FOLDER, step, integrity.MARK)
    known_here = (here / integrity.MARK).is_file() and (here / integrity.MARK).read_bytes()
    if known_here != object_store.read(mark) or integrity.verify(here):
        object_store.free_space(sum(i.size for i in object_store.listed(join(url, FOLDER, step))))
        here.parent.mkdir(parents=True, exist_ok=True)
        fetch_step(url, step, here)
