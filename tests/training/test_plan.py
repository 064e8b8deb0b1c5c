"""The derived numbers of a run and the learning rate that follows from them."""

from __future__ import annotations

import math

import pytest

from models.errors import ConfigError
from training.config import OptimConfig
from training.plan import make_plan
from training.schedule import learning_rate


def test_batches_and_steps_follow_from_one_invariant() -> None:
    plan = make_plan(OptimConfig(batch_size=8, accum_freq=4, epochs=3), samples_per_epoch=1000, world_size=2)
    assert plan.global_batch == 8 * 4 * 2
    assert (plan.steps_per_epoch, plan.total_steps) == (15, 45)
    assert [plan.epoch_of(s) for s in (0, 14, 15, 45)] == [0, 0, 1, 3]
    assert plan.ends_epoch(15) and not plan.ends_epoch(16)


def test_less_than_one_global_batch_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match="100 samples is less than one global batch of 128"):
        make_plan(OptimConfig(batch_size=64), samples_per_epoch=100, world_size=2)


def test_the_rate_warms_up_linearly_and_falls_as_a_half_cosine() -> None:
    optim = OptimConfig(lr=1.0, warmup=10, epochs=1, batch_size=1)
    plan = make_plan(optim, 110, 1)
    rates = [learning_rate(optim, plan, step) for step in range(110)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[60] == pytest.approx(0.5 * (1 + math.cos(math.pi * 50 / 100)))
    assert rates[10] == 1.0 and 0 < rates[-1] < 1e-3


def test_the_cooldown_starts_late_and_ends_where_told() -> None:
    optim = OptimConfig(
        lr=1.0, warmup=0, epochs=4, batch_size=1, lr_scheduler="const-cooldown", epochs_cooldown=1, lr_cooldown_end=0.1
    )
    plan = make_plan(optim, 10, 1)
    rates = [learning_rate(optim, plan, step) for step in range(40)]
    assert rates[:31] == [1.0] * 31
    assert rates[35] == pytest.approx(0.5 * 0.9 + 0.1)


def test_skip_scheduler_keeps_the_rate() -> None:
    optim = OptimConfig(lr=0.3, warmup=10, skip_scheduler=True, batch_size=1)
    assert learning_rate(optim, make_plan(optim, 10, 1), 0) == 0.3
