"""The data report: what was read, what is trained, what was left out and why. Numbers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxtune.config import DataError
from jaxtune.data import mixing, preprocess
from jaxtune.data.cache import CachedSource
from jaxtune.data.dataset import Batches, Dataset
from jaxtune.data.lost import LostShare
from jaxtune.data.report import near_duplicates as minhash
from jaxtune.data.report.columns import column_values

# What is counted of examples and records -> what it means.
FLAGS = {
    "split_at_boundary": "rows split where a token would reach over an answer's edge",
    "answers_not_kept_exactly": "rows whose blanks or Unicode form the tokenizer does not keep",
    "truncated": "rows cut to max_length",
    "answers_cut": "rows whose last answer lost its end to that cut; it teaches no stop",
    "trained_tokens_cut": "trained tokens lost to that cut",
    "trained_tokens_dropped": "trained tokens in rows that were dropped, mostly for their length",
    "typed_control_tokens": "rows whose own text contains control tokens",
    "short_answers": "rows with an answer of one word",
    "not_provable": "rows that came as token ids: what is trained of them cannot be proven",
    "no_stop_trained": "of these train no end of turn",
    "duplicates": "rows that are the same as an earlier one, token for token",
    "near_duplicates": "records that say nearly the same as an earlier one",
}
_VALUES = 20  # of a column that are named; the others are counted together


def report(
    dataset: Dataset, batches: Batches | None = None, *, total_steps: int | None = None
) -> dict[str, Any]:
    """Report what `preview --stats --json` prints; with `batches` also how a run will batch it.

    `lengths` are tokens per example. Everything is counted over this side of a split, but for the
    rows that were dropped: they are on neither side, and are counted over whole sources.
    """
    lengths, trained = dataset.token_counts, dataset.trained_counts
    marks = dataset.gather("flags")
    counts = {
        name: int(np.count_nonzero(marks & (1 << bit))) for bit, name in enumerate(preprocess.FLAGS)
    }
    endless = counts["no_stop_trained"] + sum(
        not _teaches_stop(dataset, int(i))
        for i in np.flatnonzero(_flagged(dataset, "answers_cut", without="no_stop_trained"))
    )
    dropped = _dropped(dataset)
    distinct = np.unique(dataset.chosen, return_index=True)[1]
    digests = dataset.gather("digests")[distinct]
    counts |= {
        "trained_tokens_cut": int(dataset.gather("lost").sum(dtype=np.int64)),
        "trained_tokens_dropped": _counted(dataset, "trained_tokens_dropped"),
        "duplicates": len(digests) - len(np.unique(digests)),
        "near_duplicates": near_duplicates(dataset),
    }
    result: dict[str, Any] = {
        "records": _records(dataset),
        "examples": len(dataset),
        "dropped": sum(found["count"] for found in dropped.values()),
        "dropped_by_reason": dropped,
        "tokens_total": int(lengths.sum()),
        "tokens_trained": int(trained.sum()),
        "trained_share": float(trained.sum() / max(1, lengths.sum())),
        "lengths": _quantiles(lengths),
        "trained_lengths": _quantiles(trained),
        "stop_trained_share": 1.0 - endless / max(1, len(dataset)),
        **{name: counts[name] for name in FLAGS},
        "flags": FLAGS,
        "by_dataset": by_dataset(dataset),
        "mixture": mixing.table(dataset.strata) if dataset.mixed else [],
        "fingerprint": dataset.fingerprint,
        "notes": list(dataset.notes),
    }
    if batches is not None:
        result["packing"] = {
            "rows": batches.rows,
            "row_length": batches.row_length,
            "fill": batches.fill,
            "batch_size": batches.batch_size,
            "steps_per_epoch": batches.steps_per_epoch,
        }
        if total_steps is not None:
            result["packing"]["total_steps"] = total_steps
    return result


def refuse(dataset: Dataset) -> None:
    """Raise `DataError` if training could only do harm, before a device is touched."""
    cut = _flagged(dataset, "answers_cut")
    if cut.all() and not any(_teaches_stop(dataset, i) for i in range(len(dataset))):
        raise DataError(
            f"{dataset.sources[0].path}: all {len(dataset)} rows lose the end of their answer to "
            f"max_length ({dataset.max_length}), so no row teaches where to stop. Raise "
            "max_length, or set truncation to drop."
        )


def _flagged(dataset: Dataset, name: str, *, without: str | None = None) -> NDArray[np.bool_]:
    """Mark the examples that have the flag `name`, and not the flag `without`."""
    flags = dataset.gather("flags")
    marked: NDArray[np.bool_] = (flags & (1 << preprocess.FLAGS.index(name))) != 0
    if without is not None:
        marked &= (flags & (1 << preprocess.FLAGS.index(without))) == 0
    return marked


def _teaches_stop(dataset: Dataset, index: int) -> bool:
    """Tell whether what is left of an example trains an end of turn, also that of an earlier
    answer.
    """
    ids, weights = dataset.tokens(index)
    stops = dataset.sources[int(dataset.source_of[index])].stop_ids
    return bool(weights[np.isin(ids, stops)].any())


def distribution(
    dataset: Dataset, entries: Sequence[preprocess.Entry], column: str
) -> dict[str, dict[str, int]]:
    """Count {value: {"records", "examples"}} of a column, the commonest first.

    `entries` are those `dataset` was opened from; they are read again. Records without the column
    count under "(absent)". Raises `DataError` when no record has it.
    """
    labels = column_values(dataset, entries, column)
    if labels is None:
        raise DataError(f"columns: no record that is trained has a column '{column}'.")
    _, first = np.unique(dataset.record_of, return_index=True)
    records, examples = Counter(labels[first].tolist()), Counter(labels.tolist())
    named = [value for value, _ in examples.most_common(_VALUES)]
    found = {v: {"records": records[v], "examples": examples[v]} for v in named}
    if len(examples) > _VALUES:
        found[f"({len(examples) - _VALUES} others)"] = {
            "records": records.total() - sum(part["records"] for part in found.values()),
            "examples": examples.total() - sum(part["examples"] for part in found.values()),
        }
    return found


def histograms(dataset: Dataset, bins: int = 30) -> dict[str, dict[str, list[int]]]:
    """Count how often each length occurs: {what: {"edges": n + 1 whole numbers, "counts": n}}.

    Bin i holds the lengths from edges[i] up to, not including, edges[i + 1]; all bins are equally
    wide but for the last, which ends with the longest.
    """
    return {
        "Tokens of an example": _histogram(dataset.token_counts, bins),
        "Trained tokens of an example": _histogram(dataset.trained_counts, bins),
    }


def overlap(train: Dataset, held_out: Dataset) -> int:
    """Count the held-out examples that are also trained, token for token."""
    return int(np.isin(held_out.gather("digests"), train.gather("digests")).sum())


def near_overlap(train: Dataset, held_out: Dataset) -> int:
    """Count the held-out records that say nearly the same as a trained one, or just the same."""
    _, trained = _sayings(train)
    _, held_out_records = _sayings(held_out)
    alike = minhash.first_near_duplicates(np.concatenate([trained, held_out_records]))[
        len(trained) :
    ]
    return int((alike < len(trained)).sum())


def near_duplicates(dataset: Dataset) -> int:
    """Count records that say nearly the same as an earlier one, but not in the same tokens."""
    examples, sayings = _sayings(dataset)
    earlier = minhash.first_near_duplicates(sayings)
    later = np.flatnonzero(earlier < len(earlier))
    digests = dataset.gather("digests")[examples]
    _, first = np.unique(digests, return_index=True)
    return int(np.isin(later, first).sum())


def _sayings(dataset: Dataset) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """Return the first example of each record, and what that record says, as a signature."""
    _, first = np.unique(dataset.record_of, return_index=True)
    examples = np.sort(first)
    parts = []
    for number, source in enumerate(dataset.sources):
        here = examples[dataset.source_of[examples] == number]
        every = source.stored.arrays["signatures"].reshape(-1, minhash.PLACES)
        parts.append(every[dataset.chosen[here] - dataset.starts[number]])
    return examples, np.concatenate(parts)


def _records(dataset: Dataset) -> int:
    """Count the records of this side, and those on neither because nothing of them is trained."""
    total = _counted(dataset, "records")
    for number, source in enumerate(dataset.sources):
        rows = dataset.gather("rows")[dataset.source_of == number]
        total += len(np.unique(rows)) - len(np.unique(source.stored.arrays["rows"]))
    return total


def _counted(dataset: Dataset, name: str) -> int:
    return sum(source.stored.summary["counts"].get(name, 0) for source in dataset.sources)


def _dropped(dataset: Dataset) -> dict[str, dict[str, Any]]:
    dropped: dict[str, dict[str, Any]] = {}
    for source in dataset.sources:
        for reason, found in source.stored.summary["dropped"].items():
            entry = dropped.setdefault(reason, {"count": 0, "first": []})
            entry["count"] += found["count"]
            entry["first"] += [
                {"where": source.where(first), "detail": first["detail"]}
                for first in found["first"]
            ]
    return dropped


def by_dataset(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Count the examples of each dataset by its name, and what is lost of all its rows."""
    return {name: _part(dataset.only(name), dataset, name) for name in dict.fromkeys(dataset.names)}


def _part(part: Dataset, whole: Dataset, name: str) -> dict[str, Any]:
    stored = [source.stored for source in whole.sources if source.name == name]
    rows, answers = (LostShare.of(stored, what) for what in ("dropped", "untrained"))
    return {
        "format": ", ".join(dict.fromkeys(each.summary["format"] for each in stored)),
        "examples": len(part),
        "tokens_total": int(part.token_counts.sum()),
        "tokens_trained": int(part.trained_counts.sum()),
        "rows": rows.of_all,
        "dropped": rows.lost,
        "dropped_share": rows.share,
        "dropped_by_reason": _reasons(stored, "dropped"),
        "answers": answers.of_all,
        "untrained": answers.lost,
        "untrained_share": answers.share,
        "untrained_by_reason": _reasons(stored, "untrained"),
    }


def _reasons(stored: Sequence[CachedSource], what: str) -> dict[str, int]:
    """Count by reason what the sources lost, the commonest first."""
    counts: Counter[str] = Counter()
    for each in stored:
        counts.update({reason: lost["count"] for reason, lost in each.summary[what].items()})
    return dict(counts.most_common())


def _quantiles(values: NDArray[np.int64]) -> dict[str, int]:
    if not len(values):
        return {}
    named = {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    found = np.percentile(values, list(named.values()), method="inverted_cdf")
    return {name: int(value) for name, value in zip(named, found, strict=True)}


def _histogram(values: NDArray[np.int64], bins: int) -> dict[str, list[int]]:
    if not len(values):
        return {"edges": [], "counts": []}
    low, high = int(values.min()), int(values.max())
    width = -(-(high - low + 1) // bins)
    counts = np.bincount((values - low) // width)
    return {
        "edges": [*(low + width * i for i in range(len(counts))), high + 1],
        "counts": counts.tolist(),
    }
