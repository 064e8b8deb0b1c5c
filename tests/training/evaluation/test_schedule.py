"""When an evaluation is due: once at each point that was asked for, whatever the global batch is."""

from __future__ import annotations

import re

import pytest

from training.config import EvalConfig
from training.errors import ConfigError
from training.evaluation.schedule import Every, check_cadences, check_sets, describe_cadences, due_after
from training.plan import Plan


def plan_of(global_batch: int, samples_per_epoch: int = 480, epochs: int = 5) -> Plan:
    return Plan(1, global_batch, 1, samples_per_epoch, epochs, warmup_steps=0)


def due_steps(every: Every, plan: Plan) -> list[int]:
    return [step for step in range(1, plan.total_steps + 1) if every.is_due(plan, step)]


def test_epochs_are_counted_and_the_last_one_always_counts() -> None:
    assert due_steps(Every(epochs=2), plan_of(48)) == [20, 40, 50]


def test_zero_epochs_mean_never_even_at_the_end() -> None:
    assert due_steps(Every(epochs=0), plan_of(48)) == []
    assert due_steps(Every(epochs=0, steps=20), plan_of(48)) == [20, 40]


def test_steps_and_samples_come_in_addition_to_epochs() -> None:
    assert due_steps(Every(epochs=5, steps=20, samples=48 * 15), plan_of(48)) == [15, 20, 30, 40, 45, 50]


@pytest.mark.parametrize("global_batch", [1, 7, 48, 100])
@pytest.mark.parametrize("samples", [100, 101, 480])
def test_by_samples_each_multiple_is_due_once_at_the_first_step_that_has_seen_it(
    global_batch: int, samples: int
) -> None:
    plan = plan_of(global_batch)
    seen = [step * global_batch for step in due_steps(Every(epochs=0, samples=samples), plan)]
    multiples = range(samples, plan.total_steps * global_batch + 1, samples)
    assert [-(-multiple // global_batch) * global_batch for multiple in multiples] == seen


def test_before_the_first_step_all_that_is_ever_due_comes_if_asked_for() -> None:
    plan = plan_of(48)
    assert due_after(EvalConfig(), plan, 0) == (False, False)
    assert due_after(EvalConfig(evaluate_first=True, zeroshot_frequency=7), plan, 0) == (True, True)
    assert due_after(EvalConfig(evaluate_first=True, val_frequency=0), plan, 0) == (True, False)
    by_steps = EvalConfig(evaluate_first=True, zeroshot_frequency=0, val_frequency=0, val_every_n_steps=9)
    assert due_after(by_steps, plan, 0) == (False, True)


def test_the_two_kinds_have_cadences_of_their_own() -> None:
    config = EvalConfig(zeroshot_frequency=2, val_frequency=0, zeroshot_every_n_steps=15, val_every_n_samples=48 * 6)
    due = {step: due_after(config, plan_of(48), step) for step in (6, 15, 20, 30)}
    assert due == {6: (False, True), 15: (True, False), 20: (True, False), 30: (True, True)}


@pytest.mark.parametrize("kind", ["zeroshot", "val"])
def test_fewer_samples_than_a_step_sees_are_refused_with_both_numbers(kind: str) -> None:
    config = EvalConfig(**{f"{kind}_every_n_samples": 47})
    with pytest.raises(ConfigError, match=f"^--{kind}-every-n-samples 47 is less than the 48 samples of one step"):
        check_cadences(config, plan_of(48))
    check_cadences(config, plan_of(47))


@pytest.mark.parametrize(
    ("flags", "has", "message"),
    [
        ({"zeroshot_every_n_steps": 5}, (False, True), "--zeroshot-every-n-steps needs a set"),
        ({"zeroshot_every_n_samples": 500}, (False, True), "--zeroshot-every-n-samples needs a set"),
        ({"val_every_n_steps": 5}, (True, False), "--val-every-n-steps needs --val-data"),
        ({"val_every_n_samples": 500}, (True, False), "--val-every-n-samples needs --val-data"),
        ({"evaluate_first": True}, (False, False), "--evaluate-first needs a set"),
    ],
)
def test_a_cadence_without_a_set_is_refused(flags: dict[str, int], has: tuple[bool, bool], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        check_sets(EvalConfig(**flags), *has)
    check_sets(EvalConfig(**flags), True, True)
    check_sets(EvalConfig(), *has)


def test_the_console_says_when() -> None:
    config = EvalConfig(evaluate_first=True, zeroshot_every_n_samples=5_000_000, val_frequency=0)
    assert describe_cadences(config) == (
        "before the first step, then zero-shot every 2 epochs and every 5,000,000 samples, --val-data never"
    )
    assert str(Every(epochs=1, steps=1)) == "every epoch and every step"
