"""Evaluation as sums over everything and one division, so batch size and padding cannot matter."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import jax
from jax.sharding import Mesh

from jaxtune.learn.step import Evaluate
from jaxtune.mesh import put_batch


class Part(Protocol):
    """A batch [batch_size length] of which each host makes its rows; `trained` of all its targets
    carry weight. `data.pipeline.EvalBatch` is one."""

    @property
    def batch_size(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def trained(self) -> int: ...
    def rows(self, low: int, high: int, /) -> Any: ...


class Totals(NamedTuple):
    """Host floats over a whole data set: sum(w*ce), sum(w), sum(w*hit), positions with w > 0."""

    loss: float = 0.0
    weight: float = 0.0
    correct: float = 0.0
    tokens: int = 0

    def __add__(self, other: Any) -> Totals:
        return Totals(*(a + b for a, b in zip(self, other, strict=True)))

    def row(self) -> dict[str, float]:
        """The names of metrics.jsonl and `evaluate --json`. Perplexity is exp of the mean loss."""
        weight = self.weight or 1.0
        mean = self.loss / weight
        return {
            "eval_loss": mean,
            "eval_perplexity": math.exp(mean) if mean < 700 else math.inf,
            "eval_token_accuracy": self.correct / weight,
            "eval_tokens_trained": self.tokens,
        }


def evaluate(
    eval_step: Evaluate, trained: Any, frozen: Any, batches: Iterable[Part], *, mesh: Mesh
) -> Totals:
    """`trained` and `frozen` make up the variables. The `batch_size` of `batches` is
    divisible by the mesh's row shards.

    Sums of a batch are f32 on the device; batches are added in f64 on the host.
    """
    sums, tokens = [], 0
    for batch in batches:
        size = {"batch_size": batch.batch_size, "length": batch.length}
        on_device = put_batch(batch.rows, **size, mesh=mesh)
        sums.append(eval_step(trained, frozen, on_device))
        tokens += batch.trained
    fetched = jax.device_get(sums)  # once, at the end: the device never waits for the host
    return Totals(
        loss=math.fsum(float(part.loss) for part in fetched),
        weight=math.fsum(float(part.weight) for part in fetched),
        correct=math.fsum(float(part.correct) for part in fetched),
        tokens=tokens,
    )
