"""The learning rate: its definition, its ends, and what a resume at another global batch changes."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.config import OptimConfig
from training.plan import Plan, make_plan
from training.schedule import cooldown_start, describe_change, describe_schedule, learning_rate

plans = st.builds(
    dict,
    epochs=st.integers(1, 5),
    per_epoch=st.integers(2, 200),
    batch_size=st.integers(1, 2),
    warmup=st.integers(0, 50),
    lr=st.floats(1e-6, 1.0),
    lr_scheduler=st.sampled_from(("cosine", "const", "const-cooldown")),
    epochs_cooldown=st.integers(1, 5),
    lr_cooldown_power=st.sampled_from((0.5, 1.0, 2.0)),
    end_share=st.floats(0, 1),
)


def _setting(values: dict) -> tuple[OptimConfig, Plan]:
    values = dict(values)
    per_epoch, end_share = values.pop("per_epoch"), values.pop("end_share")
    values["epochs_cooldown"] = min(values["epochs_cooldown"], values["epochs"])
    optim = OptimConfig(**values, lr_cooldown_end=end_share * values["lr"])
    return optim, make_plan(optim, per_epoch, 1)


def _reference(optim: OptimConfig, plan: Plan, step: int) -> float:
    total, warmup = plan.total_steps, plan.warmup_steps
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.lr_scheduler == "const":
        return optim.lr
    if optim.lr_scheduler == "cosine":
        return optim.lr * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2
    falling = plan.steps_per_epoch * optim.epochs_cooldown
    share = max(0, step - (total - falling)) / falling
    return optim.lr_cooldown_end + (optim.lr - optim.lr_cooldown_end) * (1 - share) ** optim.lr_cooldown_power


@given(plans)
def test_every_step_has_the_rate_of_the_definition(values: dict) -> None:
    optim, plan = _setting(values)
    rates = [learning_rate(optim, plan, step) for step in range(plan.total_steps)]
    assert rates == pytest.approx([_reference(optim, plan, step) for step in range(plan.total_steps)], abs=1e-12)
    assert all(0 <= rate <= optim.lr * (1 + 1e-9) for rate in rates)


@given(plans)
def test_the_warm_up_ends_at_the_full_rate_from_which_the_rest_goes_on(values: dict) -> None:
    optim, plan = _setting(values)
    warmup = plan.warmup_steps
    late = optim.lr_scheduler == "const-cooldown" and cooldown_start(optim, plan) <= warmup
    if not warmup or warmup >= plan.total_steps or late:
        return
    before, after = learning_rate(optim, plan, warmup - 1), learning_rate(optim, plan, warmup)
    assert before == pytest.approx(optim.lr) and after == pytest.approx(optim.lr)


@given(plans)
def test_after_the_warm_up_the_rate_never_rises_and_ends_where_told(values: dict) -> None:
    optim, plan = _setting(values)
    steps = range(min(plan.warmup_steps, plan.total_steps), plan.total_steps + 1)
    rates = [learning_rate(optim, plan, step) for step in steps]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(rates))
    if plan.warmup_steps < plan.total_steps:
        ends = {"cosine": 0.0, "const": optim.lr, "const-cooldown": optim.lr_cooldown_end}
        assert rates[-1] == pytest.approx(ends[optim.lr_scheduler], abs=1e-12)


def test_the_warm_up_has_a_default_and_may_be_given_in_samples() -> None:
    assert make_plan(OptimConfig(batch_size=8), 100, 1).warmup_steps == 10_000
    in_samples = OptimConfig(batch_size=8, warmup_samples=100)
    assert [make_plan(in_samples, 1000, ranks).warmup_steps for ranks in (1, 2, 4)] == [13, 7, 4]
    assert make_plan(OptimConfig(warmup_samples=0), 100, 1).warmup_steps == 0


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"warmup": 10}, "to 0.1 in 10 steps (80 samples), then as a half cosine to 0 at step 24"),
        ({"warmup": 0}, "0.1, then as a half cosine to 0 at step 24"),
        ({"warmup": 99}, "to 0.1 in 99 steps (792 samples), which is longer than the run's 24 steps"),
        ({"warmup": 2, "lr_scheduler": "const"}, "to 0.1 in 2 steps (16 samples), then constant to step 24"),
        (
            {"warmup": 2, "lr_scheduler": "const-cooldown", "epochs_cooldown": 1, "lr_cooldown_power": 2.0},
            "to 0.1 in 2 steps (16 samples), then constant to step 12, then down to 0 at step 24 (power 2)",
        ),
        ({"skip_scheduler": True}, "0.1 throughout"),
    ],
)
def test_a_schedule_is_told_in_one_line(settings: dict, line: str) -> None:
    optim = OptimConfig(lr=0.1, epochs=2, batch_size=8, **settings)
    assert describe_schedule(optim, make_plan(optim, 100, 1)) == line


def test_another_global_batch_changes_steps_warm_up_and_rate_and_all_of_it_is_told() -> None:
    optim = OptimConfig(lr=1.0, epochs=2, batch_size=8, warmup=4)
    one, two = make_plan(optim, 80, 1), make_plan(optim, 80, 2)
    assert describe_change((optim, one), (optim, two), samples_seen=16) == (
        "global batch 8 -> 16, steps an epoch 10 -> 5, steps in all 20 -> 10, this step 2 -> 1, "
        "samples of warm-up 32 -> 64, learning rate here 0.75 -> 0.5"
    )
    assert describe_change((optim, one), (optim, one), samples_seen=16) == ""


def test_a_warm_up_in_samples_keeps_the_rate_at_another_global_batch() -> None:
    optim = OptimConfig(lr=1.0, epochs=2, batch_size=8, warmup_samples=32)
    change = describe_change((optim, make_plan(optim, 80, 1)), (optim, make_plan(optim, 80, 2)), samples_seen=32)
    assert "warm-up" not in change and "rate" not in change and "global batch 8 -> 16" in change
