"""The data report: what was read, what is trained, what was left out and why. Numbers only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxtune.data.pipeline import Batches, Dataset

# What is counted while a source is prepared -> what it means.
FLAGS = {
    "split_at_boundary": "rows split where a token would reach over an answer's edge",
    "answers_not_kept_exactly": "rows whose blanks or Unicode form the tokenizer does not keep",
    "truncated": "rows cut to max_length",
    "answers_cut": "rows whose answer lost its end to that cut; they teach no stop there",
    "trained_tokens_cut": "trained tokens lost to that cut",
    "typed_control_tokens": "rows whose own text contains control tokens",
}


def report(dataset: Dataset, batches: Batches | None = None) -> dict[str, Any]:
    """What `preview --stats --json` prints; with `batches` also how a run will batch it.

    `lengths` are tokens per example. What is counted of records, dropped rows and flags is counted
    over whole sources, also where `dataset` is one side of a split.
    """
    lengths, trained = dataset.token_counts, dataset.trained_counts
    counts: dict[str, int] = dict.fromkeys(FLAGS, 0)
    records, examples = 0, 0
    dropped: dict[str, dict[str, Any]] = {}
    for source in dataset.sources:
        summary = source.stored.summary
        records += summary["counts"].get("records", 0)
        examples += len(source.stored.arrays["rows"])
        for flag in FLAGS:
            counts[flag] += summary["counts"].get(flag, 0)
        for reason, found in summary["dropped"].items():
            entry = dropped.setdefault(reason, {"count": 0, "first": []})
            entry["count"] += found["count"]
            entry["first"] += [
                {"where": f"{source.path}:{first['line']}", "detail": first["detail"]}
                for first in found["first"]
            ]
    digests = dataset.gather("digests")
    result: dict[str, Any] = {
        "records": records,
        "examples": len(dataset),
        "dropped": sum(found["count"] for found in dropped.values()),
        "dropped_by_reason": dropped,
        "tokens_total": int(lengths.sum()),
        "tokens_trained": int(trained.sum()),
        "trained_share": float(trained.sum() / max(1, lengths.sum())),
        "lengths": _quantiles(lengths),
        "trained_lengths": _quantiles(trained),
        "duplicates": len(digests) - len(np.unique(digests)),
        "stop_trained_share": 1.0 - counts["answers_cut"] / max(1, examples),
        **counts,
        "flags": FLAGS,
        "by_dataset": {
            name: _part(dataset.only(name), dataset, name) for name in dict.fromkeys(dataset.names)
        },
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
    return result


def _part(part: Dataset, whole: Dataset, name: str) -> dict[str, Any]:
    formats = [s.stored.summary["format"] for s in whole.sources if s.name == name]
    return {
        "format": ", ".join(dict.fromkeys(formats)),
        "examples": len(part),
        "tokens_total": int(part.token_counts.sum()),
        "tokens_trained": int(part.trained_counts.sum()),
    }


def _quantiles(values: NDArray[np.int64]) -> dict[str, int]:
    if not len(values):
        return {}
    named = {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    found = np.percentile(values, list(named.values()), method="inverted_cdf")
    return {name: int(value) for name, value in zip(named, found, strict=True)}


def overlap(train: Dataset, held_out: Dataset) -> int:
    """How many held-out examples are also trained, token for token."""
    return int(np.isin(held_out.gather("digests"), train.gather("digests")).sum())
