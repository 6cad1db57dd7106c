"""What a step is said to hold is what its batch holds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jaxtune.config import DatasetConfig
from jaxtune.data.dataset import Batches, open_dataset
from jaxtune.data.preprocess import PreprocessConfig
from jaxtune.data.progress import Counts, counts_before, counts_of
from jaxtune.data.templating.template import resolve
from jaxtune.data.tokenizer import Tokenizer


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_counts_are_those_of_the_batch(
    tmp_path: Path, byte_level: Tokenizer, packing: bool, train_on: str, weight: float
) -> None:
    """Both kinds of tokens, for every way to batch; weights and padding count as they are (P31)."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "an answer"}]
    odd = [turns[0], {**turns[1], "weight": 0}, turns[0], {**turns[1], "weight": 0.5}]
    rows = [{"messages": turns}, {"messages": turns * 3}, {"messages": odd}] * 5
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = open_dataset(
        [
            DatasetConfig(path=str(tmp_path / "a.jsonl")),
            DatasetConfig(path=str(tmp_path / "b.jsonl"), weight=weight),
        ],
        PreprocessConfig(
            byte_level, resolve("chatml", byte_level), train_on=train_on, max_length=128
        ),
    )
    batches = Batches(data, batch_size=2, seed=0, packing=packing)
    seen = Counts()
    for step in range(batches.total_steps(2)):
        batch = batches.batch(step)
        found = counts_of(batches, step)
        assert found.tokens == np.count_nonzero(batch.segment_ids)
        assert found.trained == np.count_nonzero(batch.weights)
        assert found.examples == sum(row.max() for row in batch.segment_ids)
        assert counts_before(batches, step) == seen
        seen = seen.plus(found)
