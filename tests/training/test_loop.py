"""What a run knows of its evaluations, and carries from one start to the next."""

from __future__ import annotations

import json
import math

import pytest

from jaxtune.training.loop import EvalHistory


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_no_improvement_and_is_beaten(loss: float) -> None:
    standing = EvalHistory().after(loss, 1)
    assert standing == EvalHistory(since_best=1)
    assert standing.after(3.0, 2) == EvalHistory(2, 3.0)
    assert standing.after(3.0, 2).after(loss, 3) == EvalHistory(2, 3.0, since_best=1)


def test_a_lowest_loss_that_is_not_finite_was_none() -> None:
    kept = json.loads(json.dumps({"standing": {"best_step": 4, "best_loss": math.nan}}))
    assert EvalHistory.of(kept) == EvalHistory()
    assert EvalHistory.of({}) == EvalHistory()
    assert EvalHistory.of({"standing": EvalHistory(2, 3.0, 1, 0, due=True)._asdict()}).due


def test_an_evaluation_is_due_until_it_is_made() -> None:
    assert not EvalHistory(due=True).after(3.0, 2).due
    assert not EvalHistory(due=True).after(math.nan, 2).due
