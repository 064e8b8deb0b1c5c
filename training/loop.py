"""The loop: batch, step, report, save, evaluate, stop. Its collaborators decide how; it decides in which order."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from training.config import RunConfig
from training.feed import Feed
from training.guard import NonFiniteGuard, RollbackDue
from training.plan import Plan
from training.report import Reporter
from training.saving import Saver, keeps_epoch
from training.step import TrainStep


@dataclass(frozen=True)
class Job:
    """Everything that the loop calls."""

    plan: Plan
    start_step: int
    step: TrainStep
    rate: Callable[[int], float]
    feed: Feed
    guard: NonFiniteGuard
    reporter: Reporter
    saver: Saver
    roll_back: Callable[[RollbackDue], int]  # the step to go on from
    evaluate: Callable[[int], bool]  # what is due after so many steps, if anything; False when it was stopped
    evaluate_first: bool  # what is due at the start is missing
    cadence: Cadence
    settle: Callable[[], None]  # the first step is done


class Cadence:
    """When a checkpoint is due, by epochs, steps or the clock, and where the run is told to stop."""

    def __init__(self, run: RunConfig, plan: Plan, start_step: int):
        self._run = run
        self._plan = plan
        self._start_step = start_step
        self._saved_at = time.monotonic()

    def minutes_are_up(self) -> bool:
        """True when --save-every-n-minutes have passed since the last save. Ranks agree on it in the feed."""
        minutes = self._run.save_every_n_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def saves(self, done: int) -> bool:
        """True when a checkpoint is due after `done` steps, whatever the clock says."""
        every = self._run.save_every_n_steps
        if every is not None and done % every == 0:
            return True
        return self._plan.ends_epoch(done) and self._saves_epoch(self._plan.epoch_of(done))

    def _saves_epoch(self, epoch: int) -> bool:
        return self._run.save_most_recent or keeps_epoch(self._run, epoch, self._plan)

    def stops(self, done: int) -> bool:
        """True when --stop-after-steps is reached."""
        return self._run.stop_after_steps is not None and done >= self._run.stop_after_steps

    def saved(self) -> None:
        """Start the clock anew."""
        self._saved_at = time.monotonic()


def run_loop(job: Job) -> bool:
    """Train to the end. Returns False when the run was stopped before it, with everything saved."""
    if job.evaluate_first and not job.evaluate(job.start_step):
        return False
    start = job.start_step
    while True:
        try:
            return _run_from(job, start)
        except RollbackDue as due:
            start = job.roll_back(due)


def _run_from(job: Job, start: int) -> bool:
    """Train from `start` completed steps on, as `run_loop`. RollbackDue leaves it on all ranks alike."""
    for done in range(start + 1, job.plan.total_steps + 1):
        batch = job.feed.next(save_due=job.cadence.minutes_are_up())
        if batch is None:
            _save(job, done - 1)
            return False
        result = job.step(batch, done - 1, job.rate(done - 1))
        job.guard.observe(done, result, batch)
        if job.reporter.step(done, result, job.rate(done - 1), job.feed):
            job.saver.check()
        if done == job.start_step + 1:
            job.saver.reserve()
            job.settle()
        # Order matters: a kill during a long evaluation must not cost what led up to it.
        if job.feed.save_requested or job.cadence.saves(done):
            _save(job, done)
        if not job.evaluate(done):
            # What was stopped is made up for after the resume.
            _save(job, done)
            return False
        if job.cadence.stops(done) and done < job.plan.total_steps:
            _save(job, done)
            return False
    return True


def _save(job: Job, done: int) -> None:
    job.guard.settle()
    with job.reporter.pause("checkpoint", done):
        job.saver.save(done, job.feed)
    job.cadence.saved()
