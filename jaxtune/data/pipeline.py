"""Sources -> one dataset -> the batch of a step, a pure function of (seed, step).

A dataset is tokenised once, into the cache. The plan of an epoch is made from lengths, seed and
epoch alone, so any number of hosts agree on it without talking, and the position in the data is one
integer: the step. Rows are filled only when asked for; a host asks for its own.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from jaxtune.config import ConfigError, DataError
from jaxtune.data import cache, pack, prepare
from jaxtune.data.encode import shift
from jaxtune.data.prepare import Entry, Settings, Truncation
from jaxtune.data.schema import Batch, Example, Tokens
from jaxtune.data.template import Template, TrainOn
from jaxtune.data.tokenizer import Tokenizer

T = TypeVar("T")

_LENGTH_STEP = 128  # rows of unpacked data are a multiple of this long


@dataclass(frozen=True, eq=False)
class Source:
    """One prepared source: its examples and what was counted while they were made."""

    name: str
    path: str
    stored: cache.Stored


@dataclass(frozen=True, eq=False)
class Dataset:
    """The examples of all sources, in order; `chosen` are those of this side of a split."""

    sources: tuple[Source, ...]
    chosen: NDArray[np.int64]
    max_length: int
    identity: str  # of tokenizer, template and options
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.chosen)

    @functools.cached_property
    def starts(self) -> NDArray[np.int64]:
        """Number of the first example of each source, and of all."""
        counts = [len(source.stored.arrays["rows"]) for source in self.sources]
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])

    @functools.cached_property
    def source_of(self) -> NDArray[np.int64]:
        """For each example the number of its source."""
        return np.searchsorted(self.starts, self.chosen, side="right") - 1

    @functools.cached_property
    def token_counts(self) -> NDArray[np.int64]:
        """Tokens of each example, unshifted."""
        counts = [np.diff(source.stored.arrays["offsets"]) for source in self.sources]
        return np.concatenate(counts)[self.chosen]

    @functools.cached_property
    def trained_counts(self) -> NDArray[np.int64]:
        """Tokens of each example that carry weight."""
        counts = [
            np.add.reduceat(s.stored.arrays["weights"] != 0, s.stored.arrays["offsets"][:-1])
            for s in self.sources
            if len(s.stored.arrays["rows"])
        ]
        return np.concatenate(counts).astype(np.int64)[self.chosen]

    def gather(self, name: str) -> NDArray[Any]:
        """A per-example array of the cache (`rows`, `digests`) over all examples."""
        return np.concatenate([s.stored.arrays[name] for s in self.sources])[self.chosen]

    def tokens(self, index: int) -> Tokens:
        """Example `index`, whole and unshifted."""
        source = int(self.source_of[index])
        arrays = self.sources[source].stored.arrays
        local = int(self.chosen[index] - self.starts[source])
        start, end = arrays["offsets"][local : local + 2]
        return Tokens(arrays["ids"][start:end], arrays["weights"][start:end])

    def example(self, index: int) -> Example:
        return shift(self.tokens(index))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(source.name for source in self.sources)

    def only(self, name: str) -> Dataset:
        """The examples of the sources called `name`."""
        wanted = np.array([source.name == name for source in self.sources])
        return replace(self, chosen=self.chosen[wanted[self.source_of]])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Same tokens, weights, order, tokenizer and template: same fingerprint."""
        parts = [source.stored.summary["content"] for source in self.sources]
        chosen = hashlib.sha256(self.chosen.tobytes()).hexdigest()
        return hashlib.sha256(json.dumps([parts, chosen, self.identity]).encode()).hexdigest()


def open_dataset(
    entries: Sequence[Entry],
    *,
    tokenizer: Tokenizer,
    template: Template,
    train_on: TrainOn = "assistant",
    max_length: int = 2048,
    truncation: Truncation = "drop",
    cache_dir: Path | None = None,
) -> Dataset:
    """Tokenises every source, or finds it in the cache, and puts them one after the other.

    Raises `DataError` with file and line for a broken file, and when a source leaves nothing to
    train, with the commonest reason.
    """
    if not entries:
        raise ConfigError("dataset: none given. Set --dataset FILE, or a list under datasets.")
    settings = Settings(tokenizer, template, train_on, max_length, truncation)
    folder = cache_dir or cache.default_folder()
    opened: list[Source] = []
    notes: list[str] = []
    for entry in entries:
        key = prepare.cache_key(entry, settings)
        build = functools.partial(prepare.build, entry=entry, settings=settings)
        stored, note = cache.stored(folder, key, build)
        _refuse_empty(entry, stored, max_length)
        opened.append(Source(prepare.dataset_name(entry), entry.path, stored))
        if entry.format == "auto":
            notes.append(f"{entry.path}: read as format '{stored.summary['format']}'")
        notes += [note] if note else []
    identity = json.dumps([tokenizer.fingerprint, template.fingerprint, train_on, max_length])
    total = sum(len(source.stored.arrays["rows"]) for source in opened)
    return Dataset(tuple(opened), np.arange(total), max_length, identity, tuple(notes))


def _refuse_empty(entry: Entry, stored: cache.Stored, max_length: int) -> None:
    if len(stored.arrays["rows"]):
        return
    records = stored.summary["counts"].get("records", 0)
    reason, dropped = next(iter(stored.summary["dropped"].items()))
    first = dropped["first"][0]
    knob = f" Raise max_length (now {max_length})." if "max_length" in reason else ""
    raise DataError(
        f"{entry.path}:{first['line']}: nothing to train: all {records} rows are dropped, "
        f"{dropped['count']} because: {reason}{': ' if first['detail'] else ''}{first['detail']}."
        f"{knob} `preview` shows every row."
    )


def split(dataset: Dataset, share: float, *, seed: int) -> tuple[Dataset, Dataset]:
    """(train, held out): about `share` of the records, chosen by `seed`; at least one each.

    The rows that one record was expanded into stay together.
    """
    records = np.stack([dataset.source_of, dataset.gather("rows")], axis=1)
    unique, record_of = np.unique(records, axis=0, return_inverse=True)
    count = max(1, round(share * len(unique)))
    if count >= len(unique):
        raise DataError(
            f"eval_split {share}: {len(unique)} rows are too few to hold some out. Add rows, or "
            "set eval_split 0."
        )
    held_out = np.zeros(len(unique), bool)
    held_out[pack.permutation(len(unique), seed)[:count]] = True
    mask = held_out[record_of.reshape(-1)]
    return (
        replace(dataset, chosen=dataset.chosen[~mask]),
        replace(dataset, chosen=dataset.chosen[mask]),
    )


class Batches:
    """The batches of a run, by step from 0; a pure function of (dataset, seed, step).

    `order` "shuffled" = another permutation each epoch; "file" = as the data lies, for evaluation.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int,
        packing: bool = True,
        order: Literal["shuffled", "file"] = "shuffled",
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self._order = order
        self._lengths = dataset.token_counts - 1  # after the shift
        self.row_length = dataset.max_length if packing else self._shortest_row()
        descending = np.sort(self._lengths)[::-1]
        self._bins = (
            pack.best_fit_decreasing(descending, self.row_length)
            if packing
            else pack.one_each(len(descending))
        )
        self.rows = len(self._bins.starts) - 1  # in an epoch
        self._epoch_rows = functools.lru_cache(maxsize=2)(self._plan)

    def _shortest_row(self) -> int:
        longest = int(self._lengths.max(initial=1))
        return min(self.dataset.max_length, -(-longest // _LENGTH_STEP) * _LENGTH_STEP)

    def _plan(self, epoch: int) -> pack.Rows:
        if self._order == "file":
            return pack.in_order(self._bins, self._lengths)
        return pack.shuffled(self._bins, self._lengths, self.seed, epoch)

    @property
    def steps_per_epoch(self) -> int:
        """The last one may hold empty rows; every example is in exactly one of them."""
        return -(-self.rows // self.batch_size)

    @property
    def fill(self) -> float:
        """Share of the slots in an epoch's rows that hold a token."""
        return float(self._lengths.sum()) / max(1, self.rows * self.row_length)

    def total_steps(self, num_train_epochs: float, max_steps: int = -1) -> int:
        """`max_steps` when positive, else as many as the epochs take, rounded up."""
        if max_steps > 0:
            return max_steps
        return math.ceil(num_train_epochs * self.steps_per_epoch - 1e-9)

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within the epoch), both from 0."""
        return divmod(step, self.steps_per_epoch)

    def examples(self, step: int) -> list[list[int]]:
        """The numbers of the examples in each row of the step's batch."""
        epoch, index = self.locate(step)
        plan = self._epoch_rows(epoch)
        first = index * self.batch_size
        return [
            plan.examples[plan.starts[row] : plan.starts[row + 1]].tolist()
            if row < self.rows
            else []
            for row in range(first, first + self.batch_size)
        ]

    def batch(self, step: int) -> Batch:
        """The whole batch, [batch_size row_length]."""
        return self.batch_rows(step, 0, self.batch_size)

    def batch_rows(self, step: int, low: int, high: int) -> Batch:
        """Rows low..high - 1 of the step's batch: what one host needs."""
        return pack.fill(self.examples(step)[low:high], self.dataset.example, self.row_length)


def eval_batches(dataset: Dataset, batch_size: int, *, packing: bool = False) -> Iterator[Batch]:
    """Every example once, in order; all of one shape, the last one filled up with empty rows."""
    batches = Batches(dataset, batch_size=batch_size, seed=0, packing=packing, order="file")
    for step in range(batches.steps_per_epoch):
        yield batches.batch(step)


def prefetch(
    make: Callable[[int], T], start: int, stop: int, *, depth: int = 2
) -> Generator[T, None, None]:
    """make(start), ..., make(stop - 1), made ahead in one thread; what it raises is raised here."""
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def put(item: tuple[bool, Any]) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for step in range(start, stop):
                if closed.is_set():
                    return
                put((True, make(step)))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=work, name="jaxtune-batches", daemon=True)
    thread.start()
    try:
        for _ in range(start, stop):
            fine, item = ready.get()
            if not fine:
                raise item
            yield item
    finally:
        closed.set()
        thread.join()
