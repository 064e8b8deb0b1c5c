"""What this rank is at, noted by the training thread and read by others. Knows no ranks, no files, no model.

A note is one assignment, so nobody waits for anybody: cheap enough for every step, and readable while the training
thread hangs.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from data.worker_status import WorkerState


class Moment(NamedTuple):
    """A phase of a run as of the last sign of progress, at `since` of the monotonic clock.

    step: the last one begun. wait: the agreement with other ranks that is waited for, or nothing.
    """

    phase: str = "start"
    step: int = 0
    since: float = 0.0
    wait: str = ""


class Pulse:
    """Written by the training thread of a rank; every method is a few microseconds at most."""

    def __init__(self) -> None:
        self.host = socket.gethostname()
        self.moment = Moment(since=time.monotonic())
        self.taken = ("", "")
        self._look: Callable[[bool], list[WorkerState]] | None = None
        self._unfinished: list[str] = []

    def enter(self, phase: str, step: int | None = None) -> None:
        """A phase begins: "data", "step", "save", "evaluate", and what else may take long."""
        self.moment = Moment(phase, self.moment.step if step is None else step, time.monotonic())

    def beat(self) -> None:
        """Progress inside a phase."""
        self.moment = self.moment._replace(since=time.monotonic())

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Inside: this rank has come to an agreement, and waits for the others."""
        self.moment = self.moment._replace(since=time.monotonic(), wait=what)
        try:
            yield
        finally:
            self.moment = self.moment._replace(since=time.monotonic(), wait="")

    def took(self, shard: str, sample: str) -> None:
        """The sample last taken from the loader."""
        self.taken = (shard, sample)

    def watch(self, look: Callable[[bool], list[WorkerState]]) -> None:
        """`look(with_stacks)` says what the loader's workers are at."""
        self._look = look

    def workers(self, with_stacks: bool) -> list[WorkerState]:
        """What the loader's workers are at; none before there is a loader."""
        return [] if self._look is None else self._look(with_stacks)

    @contextmanager
    def unfinished(self, what: str) -> Iterator[None]:
        """Inside, on any thread: work that is worth a short wait when the run must end, e.g. a checkpoint's writing."""
        self._unfinished.append(what)
        try:
            yield
        finally:
            self._unfinished.remove(what)

    @property
    def must_finish(self) -> bool:
        """True while some work is `unfinished`."""
        return bool(self._unfinished)
