"""From steps to the lines of `metrics.jsonl` and the console. Waits for the device only where a line is due."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from training.console import Console
from training.distributed import World
from training.feed import Feed
from training.metrics import MetricsLog
from training.plan import Plan
from training.step import StepResult

log = logging.getLogger(__name__)

# What the console shows of an evaluation; metrics.jsonl has all of it.
_SHOWN = ("-top1", "-top5", "R@1", "R@5", "clip_val_loss")
# What training stands still for.
_PAUSES = ("checkpoint", "evaluation")


class Reporter:
    """Collects what steps leave behind; every `every` steps, all ranks together, it becomes one record.

    job_time: seconds since this job, one of perhaps many of the run, began.
    """

    def __init__(
        self,
        metrics: MetricsLog | None,
        console: Console,
        plan: Plan,
        world: World,
        every: int,
        job_time: Callable[[], float] = time.perf_counter,
    ):
        self._metrics = metrics  # on rank 0 only
        self._console = console
        self._plan = plan
        self._world = world
        self._every = every
        self._job_time = job_time
        self._paused_s = dict.fromkeys(_PAUSES, 0.0)
        self._start_window()

    def _start_window(self) -> None:
        self._since = time.perf_counter()
        self._data_time_s = 0.0
        self._steps = 0
        self._skipped_steps = 0.0

    def step(self, done: int, result: StepResult, rate: float, feed: Feed) -> bool:
        """Note one step; True when a record was due, as at the first step and at the end of an epoch too."""
        self._steps += 1
        self._data_time_s += feed.data_time_s
        if done % self._every and not self._plan.ends_epoch(done) and done != 1:
            self._console.step(done)
            return False
        values = self._values(result, rate) | self._data_values(feed) | self._times()
        self._record(done, values)
        self._console.step(done, values)
        self._start_window()
        return True

    @contextmanager
    def pause(self, kind: str, done: int) -> Iterator[None]:
        """Inside, after `done` steps, training stands still for a `checkpoint` or an `evaluation`.

        Its time is the next record's to tell, and counts neither for a step nor for its data.
        """
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self._paused_s[kind] += seconds
            self._since += seconds
            self._console.paused(done, seconds)

    def evaluation(self, done: int, values: Mapping[str, float]) -> None:
        """Write the figures of an evaluation."""
        if values:
            self._record(done, dict(values) | self._times())
            shown = {name: value for name, value in values.items() if name.endswith(_SHOWN)}
            self._console.line("  " + ", ".join(f"{name} {value:.4f}" for name, value in shown.items()))

    def event(self, done: int, text: str, values: Mapping[str, Any]) -> None:
        """One warning and one record of something out of the ordinary. Collective."""
        if self._world.is_main:
            log.warning("%s", text)
        self._record(done, values)

    def rewind(self, done: int) -> None:
        """The run went back to `done` steps: what was written of later ones no longer happened."""
        with self._world.collectively("writing metrics.jsonl"):
            if self._metrics is not None:
                self._metrics.rewind(done)
        self._start_window()

    def _values(self, result: StepResult, rate: float) -> dict[str, float]:
        loss = float(result.loss)  # Host sync: every tensor of the record is ready with the first.
        batch_time = (time.perf_counter() - self._since) / self._steps
        speed = self._plan.global_batch / batch_time
        return {
            "train/loss": loss,
            **{f"train/{name}": float(part) for name, part in result.losses.items()},
            "train/lr": rate,
            "train/logit_scale": float(result.scale),
            "train/grad_norm": float(result.grad_norm),
            "train/samples_per_second": speed,
            "train/samples_per_second_per_gpu": speed / self._world.size,
            "train/data_time": self._data_time_s / self._steps,
            "train/batch_time": batch_time,
            "train/window_steps": self._steps,
        }

    def _times(self) -> dict[str, float]:
        """Where the job's time went besides steps, since the record before."""
        paused = {f"train/{kind}_time": seconds for kind, seconds in self._paused_s.items()}
        self._paused_s = dict.fromkeys(_PAUSES, 0.0)
        return paused | {"train/job_time": self._job_time()}

    def _data_values(self, feed: Feed) -> dict[str, Any]:
        return {f"train/{name}": value for name, value in feed.metrics().items()}

    def _record(self, done: int, values: Mapping[str, Any]) -> None:
        epoch, samples_seen = self._plan.epoch_of(done), done * self._plan.global_batch
        with self._world.collectively("writing metrics.jsonl"):
            if self._metrics is not None:
                self._metrics.write(values, step=done, epoch=epoch, samples_seen=samples_seen)
