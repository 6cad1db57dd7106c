"""Learning rates against transformers', live and stored, and at points known by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from golden import schedules as golden

from jaxtune.config import ConfigError, defaults
from jaxtune.training import schedules

STORED = json.loads(golden.FILE.read_text())


def rates(
    kind: str, steps: int, *, warmup: int, total: int, lr: float = 0.2, **options: Any
) -> list[float]:
    at = schedules.schedule(
        kind, learning_rate=lr, warmup_steps=warmup, total_steps=total, **options
    )
    return [float(rate) for rate in at(jnp.arange(steps))]


def test_linear_and_cosine_points() -> None:
    linear = rates("linear", 101, warmup=10, total=100)
    assert linear[0] == 0.0
    assert linear[5] == pytest.approx(0.1)
    assert linear[10] == pytest.approx(0.2)
    assert linear[55] == pytest.approx(0.1)
    assert linear[100] == 0.0
    cosine = rates("cosine", 101, warmup=10, total=100)
    assert cosine[55] == pytest.approx(0.1)
    assert cosine[32] == pytest.approx(0.1 * (1 + math.cos(math.pi * 22 / 90)), rel=1e-5)
    assert cosine[100] == pytest.approx(0.0, abs=1e-8)


def test_constant_has_no_warmup_but_its_sister_has() -> None:
    assert rates("constant", 3, warmup=2, total=9) == pytest.approx([0.2] * 3)
    assert rates("constant_with_warmup", 4, warmup=2, total=9) == pytest.approx([0, 0.1, 0.2, 0.2])


def test_no_warmup_starts_at_the_peak_and_past_the_end_stays_where_it_ended() -> None:
    assert rates("linear", 7, warmup=0, total=4) == pytest.approx([0.2, 0.15, 0.1, 0.05, 0, 0, 0])
    restarts = rates("cosine_with_restarts", 9, warmup=0, total=4, num_cycles=2)
    assert restarts[4:] == pytest.approx([0.0] * 5)
    floor = rates("warmup_stable_decay", 9, warmup=0, total=4, num_decay_steps=0.5,
                  min_lr_ratio=0.5)  # fmt: skip
    assert floor == pytest.approx([0.2, 0.2, 0.2, 0.15, *[0.1] * 5])


def test_warmup_is_a_share_below_one_and_a_number_above() -> None:
    assert schedules.warmup_length(0.03, 100) == 3
    assert schedules.warmup_length(0.03, 101) == 4  # rounded up, as transformers does
    assert schedules.warmup_length(0, 100) == 0
    assert schedules.warmup_length(1, 100) == 1
    assert schedules.warmup_length(50, 100) == 50


@pytest.mark.parametrize("case", golden.cases(), ids=lambda case: case[0])
def test_every_schedule_equals_that_of_transformers(case: tuple) -> None:
    name, kind, options, warmup, total = case
    ours = rates(kind, total, warmup=warmup, total=total, lr=golden.PEAK, **options)
    np.testing.assert_allclose(ours, STORED[name], atol=1e-7)


@pytest.mark.torch
def test_the_stored_rates_are_those_of_transformers() -> None:
    pytest.importorskip("torch")
    for name, *case in golden.cases():
        np.testing.assert_allclose(golden.reference(*case), STORED[name], rtol=1e-12, err_msg=name)


def test_every_schedule_and_option_that_can_be_configured_is_tested() -> None:
    assert {kind for _, kind, *_ in golden.cases()} == set(defaults.SCHEDULES)
    assert set(defaults.SCHEDULES) == set(schedules.AFTER_WARMUP)
    for kind, names in defaults.SCHEDULES.items():
        used = {name for _, k, options, *_ in golden.cases() if k == kind for name in options}
        assert used <= set(names)
        assert set(names) - used <= {"num_cycles"}


def test_a_peak_of_zero_stays_zero() -> None:
    for kind, options in (("polynomial", {}), ("cosine_with_min_lr", {"min_lr": 0.0})):
        assert rates(kind, 5, warmup=1, total=4, lr=0.0, **options) == [0.0] * 5


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="5 steps of warmup and 6 of decay do not fit into a run"):
        rates("warmup_stable_decay", 1, warmup=5, total=10, num_decay_steps=6)
    with pytest.raises(ValueError, match="lr_scheduler_type 'wave'; there are: linear"):
        rates("wave", 1, warmup=0, total=1)
    with pytest.raises(ValueError, match="takes one of min_lr and min_lr_rate"):
        rates("cosine_with_min_lr", 1, warmup=0, total=1)
