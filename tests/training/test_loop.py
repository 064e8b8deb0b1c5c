"""The order of what happens at a step, told by collaborators that only note that they were called."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from training.config import RunConfig
from training.guard import RollbackDue
from training.loop import Cadence, Job, run_loop
from training.plan import Plan

PLAN = Plan(1, 8, 1, samples_per_epoch=32, epochs=2, warmup_steps=0)  # 4 steps an epoch


@dataclass
class Notes:
    """What was called, in order."""

    lines: list[str] = field(default_factory=list)

    def note(self, what: str) -> Callable[..., Any]:
        return lambda done, *_: self.lines.append(f"{what} {done}")


def job_of(notes: Notes, run: RunConfig, due: set[int], start: int = 0, stopped_at: int = -1, **changes: Any) -> Job:
    def evaluate(done: int) -> bool:
        if done in due:
            notes.lines.append(f"evaluate {done}")
        return done != stopped_at

    def report(done: int, *_: Any) -> bool:
        notes.lines.append(f"record {done}")
        return True

    parts: dict[str, Any] = {
        "plan": PLAN,
        "start_step": start,
        "step": lambda batch, done, rate: notes.lines.append(f"step {done + 1}"),
        "rate": lambda done: 0.0,
        "feed": SimpleNamespace(next=lambda save_due: object(), save_requested=False),
        "guard": SimpleNamespace(observe=lambda *_: None, settle=lambda: None),
        "reporter": SimpleNamespace(step=report, pause=lambda kind, done: nullcontext()),
        "saver": SimpleNamespace(save=notes.note("save"), check=lambda: None, reserve=lambda: None),
        "roll_back": lambda error: 2,
        "evaluate": evaluate,
        "evaluate_first": False,
        "cadence": Cadence(run, PLAN, start),
        "settle": lambda: None,
    }
    return Job(**(parts | changes))


def at(notes: Notes, step: int) -> list[str]:
    return [line.split()[0] for line in notes.lines if line.endswith(f" {step}")]


def test_an_evaluation_comes_behind_the_save_that_is_due_and_needs_none() -> None:
    notes = Notes()
    assert run_loop(job_of(notes, RunConfig(save_every_n_steps=3), due={2, 3, 4}))
    assert at(notes, 2) == ["step", "record", "evaluate"]
    assert at(notes, 3) == at(notes, 4) == ["step", "record", "save", "evaluate"]
    assert at(notes, 5) == ["step", "record"]


def test_what_is_told_to_stop_evaluates_first() -> None:
    notes = Notes()
    assert not run_loop(job_of(notes, RunConfig(stop_after_steps=3), due={3}))
    assert at(notes, 3) == ["step", "record", "evaluate", "save"]
    assert at(notes, 4) == []


def test_an_evaluation_that_is_stopped_is_saved_and_ends_the_run() -> None:
    notes = Notes()
    assert not run_loop(job_of(notes, RunConfig(), due={2}, stopped_at=2))
    assert at(notes, 2) == ["step", "record", "evaluate", "save"]
    assert at(notes, 3) == []


def test_what_is_missing_at_the_start_comes_before_the_first_step() -> None:
    notes = Notes()
    assert run_loop(job_of(notes, RunConfig(), due={3}, start=3, evaluate_first=True))
    assert notes.lines[:2] == ["evaluate 3", "step 4"]
    notes = Notes()
    assert not run_loop(job_of(notes, RunConfig(), due={3}, start=3, evaluate_first=True, stopped_at=3))
    assert notes.lines == ["evaluate 3"]


@pytest.mark.parametrize("kept", [1, 2])
def test_epochs_that_are_not_kept_are_evaluated_all_the_same(kept: int) -> None:
    notes = Notes()
    assert run_loop(job_of(notes, RunConfig(save_frequency=kept), due={4, 8}))
    assert at(notes, 4) == ["step", "record", *(["save"] if kept == 1 else []), "evaluate"]
    assert at(notes, 8) == ["step", "record", "save", "evaluate"]


def test_a_rollback_found_before_an_evaluation_takes_its_place() -> None:
    notes, found = Notes(), iter([True])

    def evaluate(done: int) -> bool:
        if done == 3 and next(found, False):
            raise RollbackDue(3, 3, [])
        notes.lines.append(f"evaluate {done}")
        return True

    assert run_loop(job_of(notes, RunConfig(), due=set(), evaluate=evaluate))
    assert at(notes, 3) == ["step", "record", "step", "record", "evaluate"]
