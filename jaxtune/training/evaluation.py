"""Evaluation as sums over everything and one division, so batch size and padding cannot matter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from jaxtune.data.dataset import EvalBatch
from jaxtune.parallel.mesh import put_batch
from jaxtune.training.step import EachToken, Evaluate


class Totals(NamedTuple):
    """Host floats over a whole data set: sum(w*ce), sum(w), sum(w*hit), positions with w > 0."""

    loss: float = 0.0
    weight: float = 0.0
    correct: float = 0.0
    tokens: int = 0

    def __add__(self, other: Any) -> Totals:
        return Totals(*(a + b for a, b in zip(self, other, strict=True)))

    def row(self) -> dict[str, float]:
        """The names of metrics.jsonl. Perplexity is exp of the mean loss."""
        weight = self.weight or 1.0
        mean = self.loss / weight
        return {
            "eval_loss": mean,
            "eval_perplexity": math.inf if mean >= 700 else math.exp(mean),
            "eval_token_accuracy": self.correct / weight,
            "eval_tokens_trained": self.tokens,
        }


def evaluate(
    eval_step: Evaluate, trained: Any, frozen: Any, batches: Iterable[EvalBatch], *, mesh: Mesh
) -> Totals:
    """`trained` and `frozen` make up the variables. The `batch_size` of `batches` is
    divisible by the mesh's row shards. A batch is asked for when the one before the last is done:
    what `batches` raises then ends the evaluation with hardly anything under way.

    Sums of a batch are f32 on the device; batches are added in f64 on the host.
    """
    sums, tokens = [], 0
    for batch in batches:
        size = {"batch_size": batch.batch_size, "length": batch.length}
        on_device: Any = put_batch(batch.rows, **size, mesh=mesh)
        sums.append(eval_step(trained, frozen, on_device))
        tokens += batch.trained
        jax.block_until_ready(sums[-2:-1])  # the last one goes on meanwhile
    fetched = jax.device_get(sums)
    return Totals(
        loss=math.fsum(float(part.loss) for part in fetched),
        weight=math.fsum(float(part.weight) for part in fetched),
        correct=math.fsum(float(part.correct) for part in fetched),
        tokens=tokens,
    )


class Examples(NamedTuple):
    """Sums of each example's own tokens, float64 `[examples]`: sum(w*ce), sum(w), sum(w*hit), and
    how many have a weight. Added up over any group of examples they are that group's `Totals`."""

    loss: NDArray[np.float64]
    weight: NDArray[np.float64]
    correct: NDArray[np.float64]
    tokens: NDArray[np.int64]


def each_example(
    losses: EachToken,
    variables: Any,
    batches: Iterable[tuple[Any, Sequence[Sequence[int]]]],
    *,
    count: int,
    mesh: Mesh,
) -> Examples:
    """`evaluate`, example by example, of `count` examples.

    `batches` are host batches [B T] with the numbers of the examples in each row; number i of a row
    is its segment i + 1. A token's cross-entropy is f32 on the device; all sums are f64 on the
    host, so that neither the batch nor the neighbours in a row show in them.
    """
    sums = Examples(np.zeros(count), np.zeros(count), np.zeros(count), np.zeros(count, np.int64))
    waiting: tuple[Any, NDArray[np.int64], Any] | None = None
    for batch, rows in batches:
        owners = _owners(batch.segment_ids, rows)
        on_device = losses(variables, _placed(batch, mesh))
        if waiting is not None:  # one late, so that the device never waits for the host
            _add(sums, *waiting)
        waiting = batch.weights, owners, on_device
    if waiting is not None:
        _add(sums, *waiting)
    return sums


def _placed(batch: Any, mesh: Mesh) -> Any:
    rows, length = batch.inputs.shape

    def part(lo: int, hi: int) -> Any:
        return type(batch)(*(values[lo:hi] for values in batch))

    return put_batch(part, batch_size=rows, length=length, mesh=mesh)


def _owners(segment_ids: NDArray[np.integer], rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """The example of each token `[B T]`, -1 for padding.

    rows [[7, 2], []]   segments 1 1 2 0   ->    7  7  2 -1
                                 0 0 0 0        -1 -1 -1 -1
    """
    table = np.full((len(rows), 1 + max(map(len, rows), default=0)), -1)
    for number, row in enumerate(rows):
        table[number, 1 : 1 + len(row)] = row
    return np.take_along_axis(table, segment_ids.astype(np.int64), axis=1)


def _add(
    sums: Examples, weights: NDArray[np.floating], owners: NDArray[np.int64], on_device: Any
) -> None:
    each = jax.device_get(on_device)
    counts = weights != 0
    owners, w = owners[counts], weights[counts].astype(np.float64)
    size = len(sums.loss)
    sums.loss[:] += np.bincount(owners, w * each.loss[counts], size)
    sums.weight[:] += np.bincount(owners, w, size)
    sums.correct[:] += np.bincount(owners, w * each.correct[counts], size)
    sums.tokens[:] += np.bincount(owners, minlength=size)
