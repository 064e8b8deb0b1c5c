"""Signals and the job's end time, turned into one question: should this run save and stop?

Knows nothing of ranks, steps or files. A handler only sets a flag: saving inside one hangs, and a rank
that decides alone leaves the others waiting. The loop asks `requested()` and lets all ranks agree.
"""

from __future__ import annotations

import logging
import multiprocessing.resource_tracker
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
END_TIME_VARIABLES = ("CLIPYARD_END_TIME", "SLURM_JOB_END_TIME")


class Preemption:
    """Context manager. Inside it TERM, USR1, USR2 and the first Ctrl-C ask for a stop; a second Ctrl-C interrupts.

    margin_s: how long before the end time of the environment (unix seconds) a stop is asked for.
    """

    def __init__(
        self,
        *,
        margin_s: float = 180.0,
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.time,
    ):
        self._clock = clock
        self._signal: int | None = None
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}
        self._end, self._deadline = read_deadline(environment, margin_s, clock())

    def requested(self) -> str | None:
        """Why this process was asked to stop, or None. Cheap: to be asked at every step, batch and wait."""
        if self._signal is not None:
            return f"signal {signal.Signals(self._signal).name}"
        now = self._clock()
        if self._end is not None and self._deadline is not None and now >= self._deadline:
            return f"the job ends in {max(0, round(self._end - now))} s"
        return None

    def seconds_to_end(self) -> float | None:
        """Until the end of the job, where the environment says when that is."""
        return None if self._end is None else self._end - self._clock()

    def __enter__(self) -> Preemption:
        # Only the main thread may install handlers; elsewhere the deadline still counts.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
            _shield_resource_tracker()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be put back from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return  # a forked loader worker inherits the handler, the decision is its parent's
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number


def _shield_resource_tracker() -> None:
    """Start multiprocessing's bookkeeper with the signals blocked, which it inherits.

    A cluster signals every process of a job; without it each semaphore of the loader ends in a traceback.
    """
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        multiprocessing.resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def read_deadline(environment: Mapping[str, str], margin_s: float, now: float) -> tuple[float | None, float | None]:
    """(end of the job, when to stop) in unix seconds, from the environment; (None, None) when it says nothing.

    A job shorter than twice the margin stops after half of what is left: stopping at once, it would be
    requeued for ever without a step done. An end time in the past is left over from another job.
    """
    for variable in END_TIME_VARIABLES:
        text = environment.get(variable, "")
        if not text:
            continue
        try:
            end = float(text)
        except ValueError:
            logger.warning("%s=%s is not a time in unix seconds: ignored", variable, text)
            continue
        if end > now:
            return end, max(end - margin_s, now + (end - now) / 2)
        logger.warning("%s lies in the past: ignored", variable)
    return None, None
