"""Sources -> one dataset -> the batch of a step, a pure function of (seed, step).

A dataset is tokenised once, into the cache. The plan of an epoch is made from lengths, seed and
epoch alone, so any number of hosts agree on it without talking, and the position in the data is one
integer: the step. Rows are made only when a batch
needs them; a host makes its own. Knows no file, no format and no device.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import math
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from jaxtune.config import ConfigError, DataError
from jaxtune.data import cache, mixing, packing, preprocess
from jaxtune.data.lost import refuse_lost
from jaxtune.data.preprocess import Entry, PreprocessConfig, Progress
from jaxtune.data.readers import location
from jaxtune.data.schema import Batch, Example, WeightedTokens
from jaxtune.data.tokenize import shift
from jaxtune.data.workers import default_processes
from jaxtune.storage.object_store import default_folder

T = TypeVar("T")

_LENGTH_STEP = 128  # rows of unpacked data are a multiple of this long


@dataclass(frozen=True, eq=False)
class Source:
    """A tokenised source: its examples and what was counted while they were made."""

    name: str
    path: str
    files: tuple[str, ...]  # by name; `stored` counts them
    stored: cache.CachedSource
    stop_ids: tuple[int, ...]  # what ends an answer, or a text
    weight: float = 1.0
    column: str | None = None  # whose values have target shares
    target: Mapping[str, float] = field(default_factory=dict)

    def where(self, first: Mapping[str, Any]) -> str:
        """Name FILE:LINE of a row that was dropped."""
        return location(self.files[first["file"]], first["line"])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A run's examples from all sources, in order; `chosen` are those of this side of a split."""

    sources: tuple[Source, ...]
    chosen: NDArray[np.int64]
    max_length: int
    identity: str  # of tokenizer, template and options
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.chosen)

    @functools.cached_property
    def starts(self) -> NDArray[np.int64]:
        """Number the first example of each source, and count all at the end."""
        counts = [len(source.stored.arrays["rows"]) for source in self.sources]
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])

    @functools.cached_property
    def source_of(self) -> NDArray[np.int64]:
        """Give for each example the number of its source."""
        return np.searchsorted(self.starts, self.chosen, side="right") - 1

    @functools.cached_property
    def token_counts(self) -> NDArray[np.int64]:
        """Count the tokens of each example, unshifted."""
        counts = [np.diff(source.stored.arrays["offsets"]) for source in self.sources]
        return np.concatenate(counts)[self.chosen]

    @functools.cached_property
    def trained_counts(self) -> NDArray[np.int64]:
        """Count the tokens of each example that carry weight."""
        return self.gather("trained").astype(np.int64)

    def gather(self, name: str) -> NDArray[Any]:
        """Gather a per-example array of the cache (`rows`, `flags`, ...) over all examples."""
        return np.concatenate([s.stored.arrays[name] for s in self.sources])[self.chosen]

    @functools.cached_property
    def record_of(self) -> NDArray[np.int64]:
        """Give each example a number that only the examples of the same record share."""
        rows = self.gather("rows")
        numbers: NDArray[np.int64] = self.source_of * (int(rows.max(initial=0)) + 1) + rows
        return numbers

    def tokens(self, index: int) -> WeightedTokens:
        """Return example `index`, whole and unshifted."""
        source = int(self.source_of[index])
        arrays = self.sources[source].stored.arrays
        local = int(self.chosen[index] - self.starts[source])
        start, end = arrays["offsets"][local : local + 2]
        return WeightedTokens(arrays["ids"][start:end], arrays["weights"][start:end])

    def example(self, index: int) -> Example:
        return shift(self.tokens(index))

    @functools.cached_property
    def mixed(self) -> bool:
        """Tell whether an epoch is anything else than every example once."""
        weights = {source.weight for source in self.sources}
        return len(weights) > 1 or any(source.column for source in self.sources)

    @functools.cached_property
    def strata(self) -> tuple[mixing.Stratum, ...]:
        """Group examples that are drawn alike. Raises `DataError` for a target that none meets."""
        parts = []
        for number, source in enumerate(self.sources):
            own = np.flatnonzero(self.source_of == number)
            values = source.stored.arrays["values"][self.chosen[own] - self.starts[number]]
            known = source.stored.summary["values"]
            parts.append(
                mixing.MixedDataset(
                    source.name,
                    source.path,
                    source.weight,
                    source.column,
                    source.target,
                    own,
                    values,
                    known,
                )
            )
        return mixing.strata(parts)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(source.name for source in self.sources)

    def only(self, name: str) -> Dataset:
        """Keep the examples of the sources called `name`."""
        wanted = np.array([source.name == name for source in self.sources])
        return replace(self, chosen=self.chosen[wanted[self.source_of]])

    def of_records(self, other: Dataset) -> Dataset:
        """Keep the examples of the records that `other`, opened from the same files, has."""
        kept = {*zip(other.source_of.tolist(), other.gather("rows").tolist(), strict=True)}
        own = zip(self.source_of.tolist(), self.gather("rows").tolist(), strict=True)
        return replace(self, chosen=self.chosen[[record in kept for record in own]])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash tokens, weights, order, tokenizer and template."""
        parts: list[Any] = [source.stored.summary["content"] for source in self.sources]
        if self.mixed:
            parts += [[s.weight, s.column, sorted(s.target.items())] for s in self.sources]
        chosen = hashlib.sha256(self.chosen.tobytes()).hexdigest()
        return hashlib.sha256(json.dumps([parts, chosen, self.identity]).encode()).hexdigest()


def open_dataset(
    entries: Sequence[Entry],
    config: PreprocessConfig,
    *,
    cache_dir: Path | None = None,
    processes: int | None = None,
    progress: Progress = lambda path, records: None,
    max_dropped: float | None = 1.0,
) -> Dataset:
    """Tokenise every source, or find it in the cache, and put them one after the other.

    `processes` (default: one a core) changes nothing but the time; `progress` hears of it.

    Raises:
        DataError: a broken file, with its line; or a source of which more than `max_dropped` is
            dropped, or nothing is left to train (not with None), with what would keep it.
    """
    if not entries:
        raise ConfigError("dataset: none given. Set --dataset FILE, or a list under datasets.")
    templates: list[str] = []
    opened: list[Source] = []
    notes: list[str] = []
    for entry, name in zip(entries, preprocess.dataset_names(entries), strict=True):
        own = preprocess.entry_config(entry, config)
        templates.append(own.template.fingerprint)
        build = functools.partial(
            preprocess.build,
            entry=entry,
            config=own,
            processes=processes or default_processes(),
            progress=progress,
        )
        key = preprocess.cache_key(entry, own)
        stored, note = cache.stored(cache_dir or default_folder(), key, build)
        source = _source(entry, name, stored, own)
        if max_dropped is not None:
            refuse_lost(entry, own, stored, where=source.where, max_dropped=max_dropped)
        opened.append(source)
        notes += [*_source_notes(entry, source, own), *([note] if note else [])]
    identity = [config.tokenizer.fingerprint, templates, config.train_on, config.max_length]
    if config.prompt_loss_weight:
        identity.append(config.prompt_loss_weight)
    dataset = Dataset(
        sources=tuple(opened),
        chosen=np.arange(sum(len(source.stored.arrays["rows"]) for source in opened)),
        max_length=config.max_length,
        identity=json.dumps(identity),
    )
    notes += [
        f"{stratum.dataset}: {len(stratum.numbers)} examples are in no target and left out"
        for stratum in (dataset.strata if dataset.mixed else ())
        if not stratum.drawn
    ]
    return replace(dataset, notes=tuple(notes))


def _source_notes(entry: Entry, source: Source, config: PreprocessConfig) -> Iterator[str]:
    """Yield what was decided about a source, and what of it has no effect."""
    summary = source.stored.summary
    if len(source.files) > 1:
        yield f"{entry.path}: {len(source.files)} files: {_some(source.files)}"
    if entry.format == "auto":
        yield f"{entry.path}: read as format '{summary['format']}'"
    if summary["unused_columns"]:
        yield f"{entry.path}: {_unused_text(entry, summary)}"
    if unread := summary["unread_kwargs"]:
        yield f"{entry.path}: {config.template.unread_text(unread, 'row')}"


def _unused_text(entry: Entry, summary: Mapping[str, Any]) -> str:
    unused = list(summary["unused_columns"])
    text = f"{', '.join(unused)} {'is' if len(unused) == 1 else 'are'} not used: rows are trained "
    text += f"as format '{summary['format']}' alone"
    for name, column in entry.columns.items():
        text += f"; {column} is read as {name}" if column in ("chosen", "rejected") else ""
    return text + "; answers with label false are trained too" * ("label" in unused)


def _source(
    entry: Entry, name: str, stored: cache.CachedSource, config: PreprocessConfig
) -> Source:
    template, special = config.template, config.tokenizer.special_tokens
    is_text = stored.summary["format"] == "text"
    return Source(
        name=name,
        path=entry.path,
        files=tuple(file.name for file in preprocess.files_of(entry)),
        stored=stored,
        stop_ids=(special.get(template.closing, -1),) if is_text else template.stop_ids,
        weight=entry.weight,
        column=entry.proportions.column if entry.proportions else None,
        target=entry.proportions.target if entry.proportions else {},
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def split(dataset: Dataset, share: float, *, seed: int) -> tuple[Dataset, Dataset]:
    """Split into (train, held out): about `share` of the records, chosen by `seed`; at least one
    each.

    The rows that one record was expanded into stay together.
    """
    unique, record_of = np.unique(dataset.record_of, return_inverse=True)
    count = max(1, round(share * len(unique)))
    if count >= len(unique):
        raise DataError(
            f"eval_split {share}: {len(unique)} rows are too few to hold some out. Add rows, or "
            "set eval_split 0."
        )
    held_out = np.zeros(len(unique), bool)
    held_out[packing.permutation(len(unique), seed)[:count]] = True
    mask = held_out[record_of.reshape(-1)]
    return (
        replace(dataset, chosen=dataset.chosen[~mask]),
        replace(dataset, chosen=dataset.chosen[mask]),
    )


class Batches:
    """A run's batches, by step from 0; a pure function of (dataset, seed, step).

    `order` "shuffled" = another permutation each epoch, mixed as the datasets' weights and
    proportions ask; "file" = every example once, as the data lies, for evaluation.
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
        self._packing = packing
        self._mixed = dataset.mixed and order == "shuffled"
        self.row_length = dataset.max_length if packing else self._shortest_row()
        self._bins = functools.lru_cache(maxsize=2)(self._packed)
        self._epoch_rows = functools.lru_cache(maxsize=2)(self._plan)
        self._ends: list[int] = []  # the step behind each epoch, as far as it is known
        self._growing = threading.Lock()  # of `_ends`: batches are made in another thread

    def _shortest_row(self) -> int:
        longest = int(self._lengths.max(initial=1))
        return min(self.dataset.max_length, -(-longest // _LENGTH_STEP) * _LENGTH_STEP)

    def drawn(self, epoch: int) -> NDArray[np.int64]:
        """Number the examples that the epoch is made of, in no order."""
        if not self._mixed:
            return np.arange(len(self.dataset))
        return mixing.draw(self.dataset.strata, self.seed, epoch)

    def _packed(self, epoch: int) -> packing.Bins:
        """Pack an epoch; done once if every epoch has the same lengths, see `_bins_of`."""
        lengths = np.sort(self._lengths[self.drawn(epoch)])[::-1]
        if not self._packing:
            return packing.one_each(len(lengths))
        return packing.best_fit_decreasing(lengths, self.row_length)

    def _bins_of(self, epoch: int) -> packing.Bins:
        return self._bins(epoch if self._mixed else 0)

    def _plan(self, epoch: int) -> packing.PackedRows:
        numbers, bins = self.drawn(epoch), self._bins_of(epoch)
        lengths = self._lengths[numbers]
        if self._order == "file":
            rows = packing.in_order(bins, lengths)
        else:
            rows = packing.shuffled(bins, lengths, self.seed, epoch)
        return rows._replace(examples=numbers[rows.examples])

    @property
    def rows(self) -> int:
        """Count the rows of the first epoch; each has as many, unless a mixture draws others."""
        return len(self._bins_of(0).starts) - 1

    @property
    def steps_per_epoch(self) -> int:
        """Count the steps of the first epoch. The last may hold empty rows."""
        return self.end_of_epoch(0)

    def end_of_epoch(self, epoch: int) -> int:
        """Return the first step behind an epoch, counted from 0."""
        with self._growing:
            while len(self._ends) <= epoch:
                rows = len(self._bins_of(len(self._ends)).starts) - 1
                before = self._ends[-1] if self._ends else 0
                self._ends.append(before - (-rows // self.batch_size))
        return self._ends[epoch]

    @property
    def fill(self) -> float:
        """Return the share of the slots in the first epoch's rows that hold a token."""
        tokens = float(self._lengths[self.drawn(0)].sum())
        return tokens / max(1, self.rows * self.row_length)

    def total_steps(self, num_train_epochs: float, max_steps: int = -1) -> int:
        """Return `max_steps` if positive, else as many steps as the epochs take, rounded up."""
        if max_steps > 0:
            return max_steps
        whole = int(num_train_epochs)
        before = self.end_of_epoch(whole - 1) if whole else 0
        if whole == num_train_epochs:
            return before
        rest = (num_train_epochs - whole) * (self.end_of_epoch(whole) - before)
        return before + math.ceil(rest - 1e-9)

    def locate(self, step: int) -> tuple[int, int]:
        """Return (epoch, step within the epoch), both from 0."""
        while not self._ends or self._ends[-1] <= step:
            self.end_of_epoch(len(self._ends))
        epoch = bisect.bisect_right(self._ends, step)
        return epoch, step - (self._ends[epoch - 1] if epoch else 0)

    def examples(self, step: int) -> list[list[int]]:
        """List the numbers of the examples in each row of the step's batch."""
        epoch, index = self.locate(step)
        plan = self._epoch_rows(epoch)
        first = index * self.batch_size
        return [
            plan.examples[plan.starts[row] : plan.starts[row + 1]].tolist()
            if row < len(plan.starts) - 1
            else []
            for row in range(first, first + self.batch_size)
        ]

    def batch(self, step: int) -> Batch:
        """Make the whole batch, [batch_size row_length]."""
        return self.batch_rows(step, 0, self.batch_size)

    def batch_rows(self, step: int, low: int, high: int) -> Batch:
        """Make rows low..high - 1 of the step's batch: what one host needs."""
        return packing.packed_batch(
            self.examples(step)[low:high], self.dataset.example, self.row_length
        )


class EvalBatch(NamedTuple):
    """A batch [batch_size length] of an evaluation.

    `rows(low, high)` makes some of its rows, so that each host makes its own; `trained` of all its
    targets carry weight.
    """

    rows: Callable[[int, int], Batch]
    batch_size: int
    length: int
    trained: int


def eval_batches(
    dataset: Dataset, batch_size: int, *, packing: bool = False
) -> Iterator[EvalBatch]:
    """Yield every example once, in order; all batches have one shape, the last filled with empty
    rows.
    """
    batches = Batches(dataset, batch_size=batch_size, seed=0, packing=packing, order="file")
    for step in range(batches.steps_per_epoch):
        numbers = np.array([n for row in batches.examples(step) for n in row], np.int64)
        trained = int(dataset.trained_counts[numbers].sum())
        rows = functools.partial(batches.batch_rows, step)
        yield EvalBatch(rows, batch_size, batches.row_length, trained)


def eval_rows(
    dataset: Dataset, batch_size: int, *, packing: bool = False
) -> Iterator[tuple[Batch, list[list[int]]]]:
    """Yield the same batches, whole, each with the numbers of the examples in its rows."""
    batches = Batches(dataset, batch_size=batch_size, seed=0, packing=packing, order="file")
    for step in range(batches.steps_per_epoch):
        yield batches.batch(step), batches.examples(step)


def prefetch(
    make: Callable[[int], T], start: int, stop: int, *, depth: int = 2
) -> Generator[T, None, None]:
    """Yield make(start), ..., make(stop - 1), made ahead in a thread; what it raises is raised
    here.
    """
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
