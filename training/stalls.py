"""Who is late: from heartbeats to one table. Knows what ranks say of themselves, not how they say it.

A rank that has entered fewer collectives than the others is one that they wait for; a rank that waits is not late.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from data.worker_status import WorkerState, process_state
from training.beats import Beat, Board, Question

log = logging.getLogger(__name__)

_MAX_LATE = 16  # rows
_MAX_OTHERS = 4
_MAX_ASKED = 8
_COLUMNS = ("rank", "host", "pid", "phase", "for", "step", "shard last taken", "sample")


def late_ranks(beats: Sequence[Beat]) -> list[int]:
    """The ranks that the others wait for; none where all are at the same point."""
    fewest = min(beat.collectives for beat in beats)
    behind = [beat.rank for beat in beats if beat.collectives == fewest]
    if len(behind) == len(beats) > 1:
        behind = [beat.rank for beat in beats if not beat.wait]
        return [] if len(behind) == len(beats) else behind
    return behind


def silence_limit_s(period_s: float) -> float:
    """From this age of its heartbeat on, a rank counts as silent."""
    return 3 * period_s + 2


class Ages:
    """How long ago each rank was heard of, by this host's clock alone."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._heard: dict[int, tuple[int, float]] = {}

    def update(self, beats: Sequence[Beat]) -> dict[int, float]:
        """Seconds since the number of a rank's heartbeats last grew, as far as it was looked at, by rank."""
        now = self._clock()
        for beat in beats:
            number, _ = self._heard.get(beat.rank, (-1, 0.0))
            if beat.number != number:
                self._heard[beat.rank] = (beat.number, now)
        return {beat.rank: now - self._heard[beat.rank][1] for beat in beats}


class StallWatch:
    """Rank 0's eye on all ranks. `explain` gives what this rank itself would answer, `beat` publishes that it lives."""

    def __init__(
        self,
        board: Board,
        stall_s: float,
        period_s: float,
        explain: Callable[[], list[str]],
        beat: Callable[[], object] = lambda: None,
    ):
        self._board = board
        self._stall_s = stall_s
        self._period_s = period_s
        self._explain = explain
        self._beat = beat
        self._ages = Ages()
        self._num_questions = 0
        self._due_s = stall_s  # of standing still, until the next report
        self._longest_s = 0.0  # since the first report

    def look(self, own: Beat) -> None:
        """To be called every period. Silent, and without a request, while this rank makes progress."""
        if own.seconds < self._stall_s / 2 and not self._longest_s:
            return
        beats = self._board.beats()
        ages = self._ages.update(beats)
        stood = {beat.rank: beat.seconds + ages[beat.rank] for beat in beats}
        longest = max(stood.values())
        if longest >= self._due_s:
            self._due_s, self._longest_s = 2 * longest, longest
            self._report(beats, stood, ages)
        elif longest < self._stall_s and self._longest_s:
            log.warning("there is progress again, %s, after more than %.0f s", own.place, self._longest_s)
            self._due_s, self._longest_s = self._stall_s, 0.0

    def _report(self, beats: list[Beat], stood: dict[int, float], ages: dict[int, float]) -> None:
        late = late_ranks(beats)
        asked = (late or [beat.rank for beat in beats])[:_MAX_ASKED]
        answers = self._ask(asked)
        silent = [rank for rank in asked if rank not in answers]
        lines = [headline(late, len(beats), max(stood.values())), *table(beats, late, stood)]
        for rank in asked:
            beat = beats[rank]
            lines.append(f"rank {rank} on {beat.host} (pid {beat.pid}):")
            lines += [f"  {line}" for line in answers.get(rank) or [_silence(beat, beats[0].host, ages[rank])]]
        if silent:
            lines[0] += f"; silent: {', '.join(map(str, silent))}"
        log.warning("%s", "\n".join(lines))

    def _ask(self, ranks: list[int]) -> dict[int, list[str]]:
        """What those say that answer in time."""
        own = {0: self._explain()} if 0 in ranks else {}
        others = tuple(rank for rank in ranks if rank)
        if not others:
            return own
        self._num_questions += 1
        question = Question(self._num_questions, others)
        self._board.ask(question)
        deadline = time.monotonic() + silence_limit_s(self._period_s)
        answers: dict[int, list[str]] = {}
        while len(answers) < len(others) and time.monotonic() < deadline:
            time.sleep(0.2)
            self._beat()  # Who waits for the answers of others must not be taken for silent.
            answers = self._board.answers(question)
        return own | answers


def _silence(beat: Beat, own_host: str, age: float) -> str:
    """What can be said of a rank that does not answer."""
    said = f"does not answer; no heartbeat for {age:.0f} s or more: "
    if beat.host == own_host and (process := process_state(beat.pid)) not in ("running", "sleeping"):
        return f"{said}its process is {process}"
    return f"{said}it is stopped, or its interpreter hangs, or its host or network failed"


class Deputy:
    """Says on another rank that rank 0 itself is silent; it may serve the store, whose answers then fail to come."""

    def __init__(self, board: Board, stall_s: float, period_s: float):
        self._board = board
        self._stall_s = stall_s
        self._limit_s = silence_limit_s(period_s)
        self._ages = Ages()
        self._age = 0.0
        self._contact = time.monotonic()
        self._due_s = stall_s

    def look(self, own: Beat) -> None:
        """To be called every period while the store answers."""
        self._contact = time.monotonic()
        self._age = self._ages.update(self._board.beats(range(1)))[0] if own.seconds > self._stall_s / 2 else 0.0

    def judge(self, seconds: float, where: str) -> None:
        """To be called every period, whatever the store does, with how long this rank has stood still, and where."""
        quiet = max(self._age, time.monotonic() - self._contact)
        if seconds < self._stall_s:
            self._due_s = self._stall_s
        elif seconds >= self._due_s and quiet > self._limit_s:
            self._due_s = 2 * seconds
            log.warning(
                "no progress for %.0f s, and rank 0 has been silent for %.0f s or more: it or its host is stopped, or "
                "cannot be reached; this rank stands %s",
                *(seconds, quiet, where),
            )


def describe_worker(worker: WorkerState) -> str:
    """One line for a loader worker."""
    doing = "waiting for storage" if worker.doing == "reading" else worker.doing
    at = f", at {worker.sample} of {worker.shard}" if worker.shard else ""
    return (
        f"loader worker {worker.number} (pid {worker.pid}) is {worker.process}; {doing} for {worker.seconds:.0f} s{at}"
    )


def headline(late: list[int], size: int, seconds: float) -> str:
    """The first line of a report."""
    stood = f"no progress for {seconds:.0f} s"
    if size == 1:
        return stood
    if not late:
        return f"{stood}: all {size} ranks are at the same point, none is behind"
    ranks = f"rank {late[0]} is" if len(late) == 1 else f"{len(late)} of {size} ranks are"
    return f"{stood}: {ranks} late, the others wait"


def table(beats: Sequence[Beat], late: list[int], stood: dict[int, float]) -> list[str]:
    """A row for each late rank and for some of the others, as lines of equal columns."""
    is_late = set(late)
    others = [beat for beat in beats if beat.rank not in is_late]
    first = [beat for beat in beats if beat.rank in is_late][:_MAX_LATE]
    shown = first + others[: _MAX_OTHERS if late else _MAX_LATE]
    rows = [_COLUMNS, *(_row(beat, stood[beat.rank]) for beat in shown)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ["  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    if len(shown) < len(beats):
        lines.append(f"  and {len(late) - len(first)} more late ones, {len(beats) - len(is_late)} that wait, in all")
    return [line.rstrip() for line in lines]


def _row(beat: Beat, seconds: float) -> tuple[str, ...]:
    phase = f"{beat.phase}, waits" if beat.wait else beat.phase
    numbers = (f"{seconds:.0f} s", str(beat.step))
    return (str(beat.rank), beat.host, str(beat.pid), phase, *numbers, beat.shard or "-", beat.sample or "-")
