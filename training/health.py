"""A thread on each rank beside the training: heartbeats, the report of a stall, and the end of all ranks together.

Knows what ranks say to each other (`training.beats`), not what they train. What is certain ends the run: a rank that
left by an exception, a process that is gone, a store that refuses. A rank that is merely silent may be stopped or
compiling: only the time-outs end that. Ordinary agreements win: whoever is on the way out is let go in peace.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from data.urls import mask_url
from data.worker_status import process_state, short_path
from training.beats import Alarm, Beat, Board, Question, place
from training.errors import EXIT_FAILED, LostRankError, PeerError, StoppedEarly, first_line
from training.pulse import Pulse
from training.stalls import Ages, Deputy, StallWatch, describe_worker, late_ranks, silence_limit_s
from training.timeouts import Timeouts

log = logging.getLogger(__name__)

_RANKS_A_SECOND = 1000  # heartbeats that the store is asked to take
_GRACE_S = 12.0  # for a rank to end by itself after an alarm
_FINISH_S = 40.0  # the same while a checkpoint is being written
_LOST_S = 15.0  # to find out which rank a broken connection belonged to
_TIMEOUT_SLACK_S = 5.0
_MAX_FRAMES = 16
_GONE = ("gone", "dead")
STORE_ERRORS = (dist.DistError, RuntimeError, TimeoutError, ConnectionError)


class Health:
    """One rank's part. `local`: the ranks that were started on this host, this one included."""

    def __init__(self, rank: int, size: int, local: range, pulse: Pulse, timeouts: Timeouts, stall_s: float):
        self._rank, self._size, self._local = rank, size, local
        self._pulse, self._timeouts, self._stall_s = pulse, timeouts, stall_s
        self._period_s = max(1.0, size / _RANKS_A_SECOND)
        self._groups: list[dist.ProcessGroup] = []
        self._number = 0
        self._answered = 0
        self._unseen = set(local) - {rank}
        self._mates: dict[int, Beat] = {}
        self._greeting = threading.Lock()
        self._refused_since: float | None = None
        self._alarm: Alarm | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)

    # ---- what the session calls

    def join(self, store: dist.Store) -> None:
        """The first heartbeat, before any other rank may look for it."""
        self._board = Board(store, self._rank, self._size)
        self._watch = StallWatch(self._board, self._stall_s, self._period_s, self._explain, self._publish)
        self._deputy = Deputy(self._board, self._stall_s, self._period_s)
        self._board.publish(self._beat())

    def start(self, groups: list[dist.ProcessGroup]) -> None:
        """`groups`: the process groups, as they are made, whose collectives are counted."""
        self._groups = groups
        if self._size > 1 or self._stall_s:
            self._thread.start()
        if self._rank and self._may_speak and self._stall_s:
            # The first thread may hang in the store that rank 0 serves.
            threading.Thread(target=self._judge, name="deputy", daemon=True).start()

    def greet_mates(self) -> None:
        """Notes the processes of this host that have come. From any thread."""
        with self._greeting:
            for rank in [rank for rank in self._unseen if self._board.has_come(rank)]:
                self._unseen.remove(rank)
                (beat,) = self._board.beats(range(rank, rank + 1))
                # Containers may hide the processes beside this one: those say nothing by being gone.
                if beat.host == self._pulse.host and process_state(beat.pid) not in _GONE:
                    self._mates[rank] = beat

    def stop(self) -> None:
        """This rank ends as it should: nobody need look for it."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(self._period_s + 1)
        if self._refused_since is None:
            with suppress(*STORE_ERRORS):
                self._board.publish(self._beat(ended=True))
                if self._rank == 0 and self._alarm is not None:
                    self._linger()

    def _linger(self) -> None:
        """The store ends with this process; the others must have had the time to read the alarm there."""
        until = time.monotonic() + 2.5 * self._period_s
        while time.monotonic() < until and not all(beat.ended for beat in self._board.beats()):
            time.sleep(0.2)

    def raise_alarm(self, error: BaseException) -> None:
        """This rank leaves by `error`, and the others cannot know it. Errors that are shared need no alarm."""
        if self._size == 1 or isinstance(error, PeerError | StoppedEarly):
            return
        text = f"rank {self._rank} on {self._pulse.host} ended: {type(error).__name__}: {first_line(error)}"
        with suppress(*STORE_ERRORS):
            self._alarm = self._board.raise_alarm(Alarm(self._rank, text, _code_of(error)))

    def explained(self, error: Exception) -> Exception:
        """For a connection that broke or timed out: an error that says which rank was lost; others as they are."""
        if self._size == 1 or isinstance(error, PeerError) or not is_lost_connection(error):
            return error
        self._alarm = alarm = self._find_lost(error)
        return (LostRankError if self._speaks(alarm) else PeerError)(alarm.text, alarm.code)

    # ---- the thread

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            try:
                self._round()
                self._refused_since = None
            except STORE_ERRORS as error:
                if not self._stop.is_set():
                    self._without_store(error)
            except Exception:
                # What watches over the run must not be what ends it.
                log.exception("the watch over the ranks has failed; the run goes on without it")
                return

    def _round(self) -> None:
        if self._refused_since is not None:
            raise ConnectionError("refused")
        beat = self._publish()
        alarm, question = self._board.notices()
        if alarm is not None:
            self._end(alarm)
        if question is not None:
            self._answer(question)
        self._look_after_mates()
        self._look_at_the_clock()
        if self._rank == 0 and self._stall_s:
            self._watch.look(beat)
        elif self._may_speak and self._stall_s:
            self._deputy.look(beat)

    def _judge(self) -> None:
        while not self._stop.wait(self._period_s):
            moment = self._pulse.moment
            # After an alarm the first thread has other things to do than to look at rank 0.
            if self._refused_since is None and self._alarm is None:
                self._deputy.judge(time.monotonic() - moment.since, place(moment.phase, moment.step))

    def _publish(self) -> Beat:
        beat = self._beat()
        self._board.publish(beat)
        return beat

    def _beat(self, ended: bool = False) -> Beat:
        moment, (shard, sample) = self._pulse.moment, self._pulse.taken
        self._number += 1
        return Beat(
            self._rank,
            *(self._pulse.host, os.getpid(), self._number, moment.phase, moment.step, moment.wait),
            seconds=time.monotonic() - moment.since,
            collectives=sum(_entered(group) for group in self._groups),
            shard=mask_url(shard),
            sample=sample,
            ended=ended,
        )

    def _answer(self, question: Question) -> None:
        if question.number > self._answered:
            self._answered = question.number
            if self._rank in question.ranks:
                self._board.answer(question, self._explain())

    def _explain(self) -> list[str]:
        """Where this rank's training thread is, and what its loader's workers are at."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        frames = [] if frame is None else traceback.extract_stack(frame)[-_MAX_FRAMES:]
        lines = ["main thread", *(f"  {short_path(at.filename)}:{at.lineno} {at.name}" for at in frames)]
        workers = [worker for worker in self._pulse.workers(with_stacks=True) if worker.pid != os.getpid()]
        busy = [worker for worker in workers if not worker.is_idle]
        for worker in busy:
            lines += [describe_worker(worker), *(f"  {line}" for line in worker.stack)]
        if idle := len(workers) - len(busy):
            lines.append(f"loader workers that have prepared as much as they may: {idle}")
        return lines

    def _look_after_mates(self) -> None:
        """Processes of this host that are gone, and did not say that they go."""
        self.greet_mates()
        gone = [beat for beat in list(self._mates.values()) if process_state(beat.pid) in _GONE]
        for beat in gone:
            del self._mates[beat.rank]
            (last,) = self._board.beats(range(beat.rank, beat.rank + 1))
            if not last.ended:
                text = f"rank {beat.rank} on {beat.host} (pid {beat.pid}) is gone, last heard of {last.place}"
                self._board.raise_alarm(Alarm(beat.rank, f"{text}: {_KILLED}", EXIT_FAILED))

    def _look_at_the_clock(self) -> None:
        """Some process groups (gloo of torch 2.8) keep the time-out that they were made with."""
        moment, limit = self._pulse.moment, self._timeouts.current_s
        slack = _TIMEOUT_SLACK_S if self._may_speak else _TIMEOUT_SLACK_S + _LOST_S
        if self._size > 1 and moment.wait and time.monotonic() - moment.since > limit + slack:
            self._board.raise_alarm(self._timed_out())

    def _timed_out(self) -> Alarm:
        """The alarm after a time-out; those who may speak find out whose it was."""
        limit = f"ranks waited for each other for {self._timeouts.current_s:.0f} s ({self._timeouts.flag})"
        if not self._may_speak:
            return Alarm(self._rank, limit, EXIT_FAILED)
        beats = self._board.beats()
        late = [f"rank {rank} on {beats[rank].host} {beats[rank].place}" for rank in late_ranks(beats)[:8]]
        return Alarm(late_ranks(beats)[0] if late else -1, f"{limit}; late: {', '.join(late) or 'none'}", EXIT_FAILED)

    # ---- the end

    def _end(self, alarm: Alarm) -> None:
        """Leaves the training thread the time to end by itself, then ends the process."""
        self._alarm = alarm
        began = time.monotonic()
        while time.monotonic() - began < (_FINISH_S if self._pulse.must_finish else _GRACE_S):
            if self._stop.wait(0.2):
                return
        # Whatever a log line may wait for: this process ends.
        killer = threading.Timer(5.0, os._exit, [alarm.code])
        killer.daemon = True
        killer.start()
        if self._speaks(alarm) or alarm.rank == self._rank:
            log.error("error: %s", alarm.text)
        for handler in logging.getLogger().handlers:
            handler.flush()
        os._exit(alarm.code)

    def _speaks(self, alarm: Alarm) -> bool:
        """One line is enough for all ranks; where rank 0 is lost, its host may be."""
        return self._rank == 0 or (alarm.rank == 0 and self._may_speak)

    @property
    def _may_speak(self) -> bool:
        return self._rank in (0, 1, len(self._local))

    def _without_store(self, error: Exception) -> None:
        """No answer, or a refusal: the process that serves the store is gone, and rank 0 with it."""
        if not self._is_refused():
            return
        assert self._refused_since is not None
        moment, now = self._pulse.moment, time.monotonic()
        # Rank 0 may have ended as it should, and this rank be about to.
        if moment.phase != "end" and min(now - moment.since, now - self._refused_since) > _GRACE_S:
            self._end(self._store_lost())

    def _is_refused(self) -> bool:
        """True once nobody listens where the store was; a host that merely does not answer may come back."""
        if self._refused_since is None and self._board.is_gone():
            self._refused_since = time.monotonic()
        return self._refused_since is not None

    def _store_lost(self) -> Alarm:
        text = f"rank 0, or what serves its store at {self._board.address}, is gone; rank {self._rank} was"
        return Alarm(0, f"{text} {self._beat().place}: {_LOST}", EXIT_FAILED)

    def _find_lost(self, error: Exception) -> Alarm:
        """Waits for the alarm that explains `error`, or for the first rank that falls silent, and raises it."""
        if "timed out" in str(error).lower():
            with suppress(*STORE_ERRORS):
                return self._board.raise_alarm(self._timed_out())
        ages, deadline = Ages(), time.monotonic() + _LOST_S
        while time.monotonic() < deadline:
            if self._alarm is not None:
                return self._alarm
            # Before the store is asked: torch prints a page about a connection that is gone.
            if self._is_refused():
                return self._store_lost()
            try:
                alarm = self._board.notices()[0] or (self._may_speak and self._silent(ages))
            except STORE_ERRORS:
                alarm = None
            if alarm:
                return alarm
            time.sleep(0.5)
        return Alarm(-1, f"the connection to another rank broke, though all are alive: {first_line(error)}", 1)

    def _silent(self, ages: Ages) -> Alarm | None:
        beats = self._board.beats()
        for rank, age in ages.update(beats).items():
            if age > silence_limit_s(self._period_s) and not beats[rank].ended:
                text = f"rank {rank} on {beats[rank].host} is silent, last heard of {beats[rank].place}: {_LOST}"
                return self._board.raise_alarm(Alarm(rank, text, EXIT_FAILED))
        return None


_KILLED = "it crashed, or was killed, e.g. for want of memory (the system's log there tells)"
_LOST = "it crashed, was killed (the system's log there tells), or the host or its network failed"


@contextmanager
def watched(health: Health) -> Iterator[None]:
    """Inside: errors that leave become known to the other ranks, and broken connections say whose they were."""
    try:
        yield
    except Exception as error:
        told = health.explained(error)
        health.raise_alarm(told)
        if told is error:
            raise
        raise told from error
    except BaseException as error:
        health.raise_alarm(error)
        raise


def is_lost_connection(error: BaseException) -> bool:
    """True for what NCCL and gloo say when a peer is gone or does not come."""
    text = str(error)
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError) or (
        isinstance(error, RuntimeError)
        and ("gloo" in text or "Connection closed by peer" in text or "Connection reset by peer" in text)
    )


def _entered(group: dist.ProcessGroup) -> int:
    """Collectives that this rank has entered on `group`."""
    try:
        return int(group._get_sequence_number_for_group())  # type: ignore[attr-defined]
    except RuntimeError:  # not before the first one
        return 0


def _code_of(error: BaseException) -> int:
    return int(getattr(error, "exit_code", EXIT_FAILED)) or EXIT_FAILED
