"""Signals and the job's end time, turned into one question: should this run save and stop?

Knows nothing of steps or files, and of ranks only which one asks Slurm. A handler only sets a flag: saving inside
one hangs, and a rank that decides alone leaves the others waiting. The loop asks `requested()`, and all ranks agree.
"""

from __future__ import annotations

import logging
import multiprocessing.resource_tracker
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger(__name__)

FROM_CLUSTER = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = (*FROM_CLUSTER, signal.SIGINT)
END_TIME_VARIABLES = ("CLIPYARD_END_TIME", "SLURM_JOB_END_TIME")
SQUEUE_WITHIN_S = 10.0
# The write that is under way when the stop is asked for, and the last one.
_WRITES = 2


class Preemption:
    """Context manager. Inside it TERM, USR1, USR2 and the first Ctrl-C ask for a stop; a second Ctrl-C interrupts.

    margin_s: how long before the job's end a stop is asked for, besides the time that saving takes. The end is that of
    the environment (unix seconds); else, in the context, what Slurm says.
    """

    def __init__(
        self,
        *,
        margin_s: float = 180.0,
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.time,
    ):
        self._environment = environment
        self._clock = clock
        self._margin_s = margin_s
        self._takes_s: dict[str, float] = {}
        self._signal: int | None = None
        self._owner = os.getpid()
        self._shield: _Shield | None = None
        self._previous: dict[int, Any] = {}
        self._began = clock()
        self._end = read_end(environment, self._began)

    def requested(self) -> str | None:
        """Why this process was asked to stop, or None. Cheap: to be asked at every step, batch and wait."""
        if self._signal is not None:
            return f"signal {signal.Signals(self._signal).name}"
        now = self._clock()
        if self._end is not None and now >= self._deadline(self._end):
            return f"the job ends in {max(0, round(self._end - now))} s"
        return None

    def _deadline(self, end: float) -> float:
        """A job shorter than twice the margin stops after half of its time.

        Stopping at once, it would be requeued for ever without a step done.
        """
        margin_s = self._margin_s + _WRITES * sum(self._takes_s.values())
        return max(end - margin_s, (self._began + end) / 2)

    def allow_for(self, what: str, seconds: float) -> None:
        """`what` (a save, an upload) took so long the last time: a stop is asked for so much earlier."""
        self._takes_s = self._takes_s | {what: seconds}  # called by the threads that write

    def describe(self) -> str:
        """When the job ends and the run stops, for a person; empty where that is not known."""
        if self._end is None:
            return ""
        now = self._clock()
        stop = self._deadline(self._end)
        return f"ends in {self._end - now:.0f} s; it saves and stops in {max(0, stop - now):.0f} s, or with a signal"

    def job_time(self) -> float:
        """Seconds since the job began."""
        return self._clock() - self._began

    def seconds_to_end(self) -> float | None:
        """Until the end of the job, where the environment says when that is."""
        return None if self._end is None else self._end - self._clock()

    def __enter__(self) -> Preemption:
        # Only the main thread may install handlers; elsewhere the deadline still counts.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
            self._shield = _Shield()
            _shield_resource_tracker()
        if self._end is None:
            # After the handlers: Slurm may take its time to answer.
            self._end = ask_slurm(self._environment, self._began)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._shield is not None:
            self._shield.lower()
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


def hold_signals() -> None:
    """For a program: signals of the cluster wait until a Preemption takes them, and for ever when it is over.

    In its first and last moments, when it imports or takes itself down, one would end it with the wrong exit code.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, FROM_CLUSTER)


def release_signals() -> None:
    """Undo `hold_signals`, where no Preemption will come."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FROM_CLUSTER)


class _Shield:
    """Processes that this one starts from now on do not see the signals of a cluster, which sends them to all of a job.

    Compilers and their pools, commands of `pipe:` and trackers' services would end by them, and the save with them.
    What is started inherits what its thread blocks: so the main thread blocks, and one that starts nothing does not.
    """

    def __init__(self) -> None:
        self._earlier = signal.pthread_sigmask(signal.SIG_BLOCK, FROM_CLUSTER)
        self._is_over, self._is_open = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._receive, name="signals", daemon=True)
        self._thread.start()
        self._is_open.wait()

    def _receive(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FROM_CLUSTER)
        self._is_open.set()
        # Python calls handlers in the main thread, whatever thread the system interrupts.
        self._is_over.wait()

    def lower(self) -> None:
        """As it was before."""
        self._is_over.set()
        self._thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._earlier)


def _shield_resource_tracker() -> None:
    """Start multiprocessing's bookkeeper with the signals blocked, which it inherits.

    A cluster signals every process of a job; without it each semaphore of the loader ends in a traceback.
    """
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        multiprocessing.resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def read_end(environment: Mapping[str, str], now: float) -> float | None:
    """End of the job in unix seconds, from the environment; None when it says nothing.

    An end time in the past is left over from another job.
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
            return end
        logger.warning("%s lies in the past: ignored", variable)
    return None


def ask_slurm(environment: Mapping[str, str], now: float) -> float | None:
    """End of the Slurm job that this is, in unix seconds; None on all ranks but the first, and without an answer.

    Of thousands of ranks asking at once the controller would not answer one; what rank 0 knows stops all.
    """
    job = environment.get("SLURM_JOB_ID", "")
    if not job or environment.get("RANK", environment.get("SLURM_PROCID", "0")) != "0":
        return None
    command = ["squeue", "-h", "-j", job, "-o", "%A %e"]
    try:
        answer = subprocess.run(
            command,
            env={**environment, "SLURM_TIME_FORMAT": "standard"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SQUEUE_WITHIN_S,
        )
    except FileNotFoundError:
        return None  # as in containers
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("the end of job %s is not known (%s): only a signal will stop the run", job, error)
        return None
    end = parse_squeue(answer.stdout, job)
    return end if end is not None and end > now else None


def parse_squeue(text: str, job: str) -> float | None:
    """The end of `job`, in unix seconds, from lines of job id and local time; None where there is none.

    The first job of an array is asked for by the array's number, and answered with all of them.
    """
    rows = [line.split() for line in text.splitlines() if line.strip()]
    for row in [row for row in rows if row[0] == job] or rows[:1]:
        try:
            return datetime.fromisoformat(row[-1]).timestamp()
        except ValueError:
            return None  # "N/A", "Unknown": there is no limit
    return None
