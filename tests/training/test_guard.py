"""When steps that are not finite are passed over, and when they end the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from data import Batch
from training.config import OptimConfig
from training.distributed import World
from training.errors import NonFiniteError
from training.guard import NonFiniteGuard, RollbackDue
from training.step import StepResult
from training.witness import Sighting

NAN = float("nan")


class Steps:
    """A guard that is shown one step after the other."""

    def __init__(self, **optim: Any):
        self.notes: list[tuple[int, str, Mapping[str, Any]]] = []
        self.guard = NonFiniteGuard(OptimConfig(**optim), World(), lambda *note: self.notes.append(note))

    def show(self, outcomes: str) -> None:
        """One step for each letter: g good, f a NaN in the features of row 2, b a NaN in the gradient."""
        for number, kind in enumerate(outcomes, 1):
            value = torch.tensor(1.0 if kind == "g" else NAN)
            bad_rows = torch.tensor([False, False, kind == "f", False])
            skipped = torch.tensor(float(kind != "g"))
            result = StepResult(value, {}, value, torch.tensor(1.0), skipped, Sighting(bad_rows, None), skipped)
            keys = [f"{number}-{row}" for row in range(4)]
            batch = Batch(
                torch.zeros(4, 3, 2, 2), torch.zeros(4, 1), {}, keys, ["a.tar", "a.tar", "pipe:cat b", "c.tar"]
            )
            self.guard.observe(number, result, batch)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [values["event/nonfinite"] for _, _, values in self.notes]


def test_a_step_is_judged_while_the_next_one_runs_or_when_settled() -> None:
    steps = Steps(max_nonfinite=3)
    steps.show("gb")
    assert steps.events == []
    steps.guard.settle()
    assert [event["step"] for event in steps.events] == [2]
    steps.guard.settle()
    assert len(steps.events) == 1


def test_the_row_whose_features_are_not_finite_is_named_alone() -> None:
    steps = Steps()
    steps.show("fg")
    assert steps.events == [
        {
            "step": 1, "loss": None, "grad_norm": None, "cause": "features", "ranks": [0], "num_samples": 1,
            "samples": {"pipe:cat b": ["1-2"]},
        }
    ]  # fmt: skip
    assert "1-2 of pipe:cat b" in steps.notes[0][1]


def test_all_samples_are_named_where_only_the_gradient_shows_it() -> None:
    steps = Steps()
    steps.show("bg")
    assert steps.events[0]["cause"] == "gradient"
    assert steps.events[0]["samples"] == {"a.tar": ["1-0", "1-1"], "pipe:cat b": ["1-2"], "c.tar": ["1-3"]}


def test_good_steps_between_start_the_count_anew() -> None:
    steps = Steps(max_nonfinite=2)
    steps.show("bbgbbgbbg")
    assert len(steps.events) == 6
    with pytest.raises(NonFiniteError, match="3 in a row"):
        Steps(max_nonfinite=2).show("gbbbg")


def test_stop_ends_the_run_at_the_first() -> None:
    with pytest.raises(NonFiniteError, match="step 2: loss nan, gradient norm nan"):
        Steps(on_nonfinite="stop", max_nonfinite=5).show("gbg")


def test_a_rollback_names_the_steps_that_led_to_it_and_the_last_one_computed() -> None:
    steps = Steps(on_nonfinite="rollback", max_nonfinite=1)
    with pytest.raises(RollbackDue) as caught:
        steps.show("gbbgg")
    assert (caught.value.first_bad, caught.value.last_done) == (2, 4)
    assert [offence["step"] for offence in caught.value.offences] == [2, 3]
    steps.guard.settle()  # the step under way belongs to the future that is given up
