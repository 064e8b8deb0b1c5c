"""Who is late, what a report says, when ranks are told, and how long they wait; single functions and small sessions."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from data.worker_status import WorkerState
from tests.helpers.gloo import run_ranks
from tests.helpers.process import poll
from training.beats import Alarm, Beat, Board, Question
from training.cli import parse_args
from training.config import ClusterConfig
from training.distributed import World, session
from training.errors import ConfigError, LostRankError, PeerError
from training.health import Health, is_lost_connection
from training.pulse import Pulse
from training.stalls import Ages, Deputy, StallWatch, describe_worker, headline, late_ranks, table
from training.timeouts import Timeouts, limits_of


def beat(rank: int, collectives: int = 7, **changes: object) -> Beat:
    return dataclasses.replace(
        Beat(rank, f"node{rank}", 100 + rank, 1, "step", 12, collectives=collectives),
        **changes,  # type: ignore[arg-type]
    )


# ---- who is late


def test_who_has_entered_fewer_collectives_is_late() -> None:
    assert late_ranks([beat(0, 9, wait="agreement"), beat(1, 8, phase="data"), beat(2, 9)]) == [1]


def test_where_all_are_in_the_same_collective_who_waits_is_not_late() -> None:
    assert late_ranks([beat(0, wait="gather"), beat(1), beat(2, wait="gather")]) == [1]


@pytest.mark.parametrize("wait", ["", "agreement"])
def test_where_all_do_the_same_nobody_is_late(wait: str) -> None:
    assert late_ranks([beat(0, wait=wait), beat(1, wait=wait)]) == []


def test_a_single_rank_is_late_by_itself() -> None:
    assert late_ranks([beat(0)]) == [0]


def test_the_table_begins_with_the_late_ranks_and_stays_short() -> None:
    beats = [beat(rank, 9, wait="agreement", phase="data") for rank in range(4096)]
    beats[4000] = beat(4000, 8, phase="data", shard="s3://b/7.tar", sample="0042")
    lines = table(beats, [4000], dict.fromkeys(range(4096), 61.0))
    assert lines[1].split() == ["4000", "node4000", "4100", "data", "61", "s", "12", "s3://b/7.tar", "0042"]
    assert lines[2].split()[:5] == ["0", "node0", "100", "data,", "waits"]
    assert len(lines) < 10 and "4095 that wait" in lines[-1]


def test_the_first_line_says_how_many_are_late() -> None:
    assert headline([3], 8, 61.4) == "no progress for 61 s: rank 3 is late, the others wait"
    assert headline([3, 4], 8, 61.4) == "no progress for 61 s: 2 of 8 ranks are late, the others wait"
    assert "none is behind" in headline([], 8, 61.4)
    assert headline([0], 1, 61.4) == "no progress for 61 s"


def test_the_age_of_a_heartbeat_is_measured_by_the_clock_of_who_looks() -> None:
    now = [100.0]
    ages = Ages(lambda: now[0])
    assert ages.update([beat(0, number=5), beat(1, number=9)]) == {0: 0.0, 1: 0.0}
    now[0] += 4
    assert ages.update([beat(0, number=6), beat(1, number=9)]) == {0: 0.0, 1: 4.0}


# ---- reports


@pytest.fixture
def board() -> Board:
    return Board(dist.HashStore(), 0, 2)


def test_a_report_comes_once_then_at_growing_intervals_and_one_line_when_it_goes_on(
    board: Board, caplog: pytest.LogCaptureFixture
) -> None:
    watch = StallWatch(board, stall_s=10, period_s=0.0, explain=lambda: ["main thread", "  here.py:1 f"])
    board.publish(beat(1, 9, wait="agreement"))

    def look(seconds: float) -> list[str]:
        caplog.clear()
        board.publish(own := beat(0, 8, seconds=seconds, phase="data"))
        watch.look(own)
        return [record.getMessage() for record in caplog.records]

    assert look(4) == look(9) == []
    (report,) = look(10.2)
    assert report.startswith("no progress for 10 s: rank 0 is late") and "    here.py:1 f" in report
    assert look(15) == look(20) == []
    assert len(look(22)) == 1
    assert look(40) == []
    (line,) = look(0)
    assert line.startswith("there is progress again, at step 12 (data), after more than 22 s")
    assert look(9) == [] and len(look(11)) == 1


def test_a_late_rank_that_does_not_answer_is_named_as_silent(board: Board, caplog: pytest.LogCaptureFixture) -> None:
    watch = StallWatch(board, stall_s=10, period_s=-0.5, explain=list)
    board.publish(beat(1, 8, phase="data"))
    board.publish(own := beat(0, 9, seconds=11, wait="agreement"))
    watch.look(own)
    (report,) = [record.getMessage() for record in caplog.records]
    assert report.splitlines()[0].endswith("rank 1 is late, the others wait; silent: 1")
    assert "it is stopped, or its interpreter hangs" in report


def test_while_its_own_rank_makes_progress_rank_0_asks_nobody(board: Board) -> None:
    watch = StallWatch(board, stall_s=10, period_s=1.0, explain=list)
    watch.look(beat(0, seconds=4))  # nobody has published: a request would wait, and fail


def test_the_deputy_speaks_when_rank_0_is_silent_and_not_before(
    board: Board, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    deputy = Deputy(board, stall_s=10, period_s=1.0)
    board.publish(beat(0))
    deputy.look(beat(1, seconds=11))
    deputy.judge(11, "at step 3 (data)")
    assert caplog.records == []  # the store has just answered, and rank 0 is not yet known to be silent
    now += 8
    deputy.judge(19, "at step 3 (data)")
    deputy.judge(20, "at step 3 (data)")
    (record,) = caplog.records
    assert "rank 0 has been silent for 8 s" in record.getMessage()


def test_the_first_alarm_counts_and_answers_find_their_question(board: Board) -> None:
    assert board.notices() == (None, None)
    first = Alarm(1, "rank 1 on node1 ended", 2)
    assert board.raise_alarm(first) == first
    assert board.raise_alarm(Alarm(0, "me too", 1)) == first
    question = Question(3, (0, 1))
    board.ask(question)
    board.answer(question, ["here"])
    assert board.notices() == (first, question)
    assert board.answers(question) == {0: ["here"]}


def test_a_worker_is_described_on_one_line() -> None:
    state = WorkerState(2, 77, "stopped", "reading", 31.4, "s3://b/7.tar", "number 9")
    said = "loader worker 2 (pid 77) is stopped; waiting for storage for 31 s, at number 9 of s3://b/7.tar"
    assert describe_worker(state) == said


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed by peer [::1]"), 1),
        (RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 2000ms"), 1),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), 1),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 0),
        (ConnectionResetError("Connection reset by peer"), 0),  # of a bucket, not of a rank
    ],
)
def test_broken_connections_between_ranks_are_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_lost_connection(error) == bool(expected)


# ---- the end


def _alarmed(monkeypatch: pytest.MonkeyPatch) -> tuple[Health, Pulse, list[int]]:
    """Rank 1 of 2, whose exit is only noted, with a short grace."""
    pulse, exits = Pulse(), []
    health = Health(1, 2, range(2), pulse, Timeouts(limits_of(ClusterConfig())), 0.0)
    health.join(dist.HashStore())
    monkeypatch.setattr("training.health._GRACE_S", 0.1)
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setattr(threading, "Timer", lambda *args: threading.Thread(target=int))
    return health, pulse, exits


ALARM = Alarm(0, "rank 0 on node0 ended: RuntimeError: out of luck", 3)


def test_after_an_alarm_a_rank_ends_with_its_code(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    health, _, exits = _alarmed(monkeypatch)
    health._end(ALARM)
    assert exits == [3]
    assert [record.getMessage() for record in caplog.records] == [f"error: {ALARM.text}"]


def test_who_is_on_the_way_out_is_let_go_in_peace(monkeypatch: pytest.MonkeyPatch) -> None:
    health, _, exits = _alarmed(monkeypatch)
    health.stop()
    health._end(ALARM)
    assert exits == []


def test_a_checkpoint_that_is_being_written_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    health, pulse, exits = _alarmed(monkeypatch)
    seen: list[list[int]] = []

    def write() -> None:
        with pulse.unfinished("writing"):
            time.sleep(1.0)
            seen.append(list(exits))

    writer = threading.Thread(target=write)
    writer.start()
    poll(lambda: pulse.must_finish, 10, "the writer")
    health._end(ALARM)
    writer.join()
    assert seen == [[]] and exits == [3]


def test_errors_that_all_ranks_know_raise_no_alarm_and_others_do() -> None:
    store = dist.HashStore()
    board = Board(store, 0, 2)
    health = Health(1, 2, range(2), Pulse(), Timeouts(limits_of(ClusterConfig())), 0.0)
    health.join(store)
    health.raise_alarm(PeerError("reading: rank 0: no such bucket", 2))
    assert board.notices()[0] is None
    health.raise_alarm(ConfigError("no such thing\nand more"))
    alarm = board.notices()[0]
    assert alarm is not None and (alarm.rank, alarm.code) == (1, 2)
    assert alarm.text.endswith(" ended: ConfigError: no such thing")


# ---- the pulse


def test_a_pulse_says_phase_step_and_what_is_waited_for() -> None:
    pulse = Pulse()
    pulse.enter("step", 4)
    pulse.enter("data")
    assert (pulse.moment.phase, pulse.moment.step, pulse.moment.wait) == ("data", 4, "")
    with contextlib.suppress(KeyError), pulse.waiting("agreement"):
        assert pulse.moment.wait == "agreement"
        raise KeyError
    assert (pulse.moment.phase, pulse.moment.wait) == ("data", "")
    assert not pulse.must_finish
    with pulse.unfinished("writing"):
        assert pulse.must_finish
    assert not pulse.must_finish


def test_an_agreement_of_one_rank_is_progress_too() -> None:
    world = World()
    before = world.pulse.moment.since
    time.sleep(0.01)
    world.max_int(3)
    assert world.pulse.moment.since > before


# ---- how long ranks wait


def test_what_is_not_given_follows_from_what_is() -> None:
    limits = limits_of(ClusterConfig())
    assert (limits.startup_s, limits.running_s, limits.stall_s) == (1800, 600, 120)
    limits = limits_of(ClusterConfig(dist_timeout_s=3600))
    assert (limits.startup_s, limits.running_s, limits.stall_s) == (3600, 3600, 120)
    limits = limits_of(ClusterConfig(dist_timeout_s=60, dist_startup_timeout_s=300, stall_timeout=0))
    assert (limits.startup_s, limits.running_s, limits.stall_s) == (300, 60, 0)
    assert limits_of(ClusterConfig(dist_timeout_s=60)).stall_s == 20


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--stall-timeout", "600"], "--stall-timeout 600 must be less than --dist-timeout-s 600"),
        (["--stall-timeout", "-1"], "--stall-timeout must not be negative"),
        (["--dist-timeout-s", "0"], "--dist-timeout-s must be positive"),
        (["--dist-startup-timeout-s", "60"], "--dist-startup-timeout-s 60 must not be less than --dist-timeout-s 600"),
    ],
)
def test_time_outs_that_make_no_sense_are_refused(flags: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_args(["--train-data", "x.tar", "--train-num-samples", "8", *flags])


def test_ranks_wait_long_at_the_start_short_after_it_and_long_where_work_is_uneven() -> None:
    timeouts = Timeouts(limits_of(ClusterConfig(dist_timeout_s=60)))
    assert (timeouts.current_s, timeouts.flag) == (1800, "--dist-startup-timeout-s")
    timeouts.settle()
    assert (timeouts.current_s, timeouts.flag) == (60, "--dist-timeout-s")
    with contextlib.suppress(KeyError), timeouts.patient():
        with timeouts.patient():
            assert timeouts.current_s == 1800
        assert timeouts.current_s == 1800
        raise KeyError
    assert timeouts.current_s == 60


def _late(limit_s: float) -> str:
    cluster = ClusterConfig(device="cpu", dist_timeout_s=limit_s, stall_timeout=0)
    try:
        with session(cluster) as world:
            world.settle()
            with world.patient:
                if world.rank == 1:
                    time.sleep(2 * limit_s)
                world.barrier()
            if world.rank == 1:
                time.sleep(4 * limit_s)
            world.barrier()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "came"


@pytest.mark.skipif(not hasattr(dist, "set_timeout"), reason="gloo of this torch keeps the time-out it was made with")
def test_a_patient_wait_may_exceed_the_limit_and_another_names_who_was_late() -> None:
    first, second = run_ranks(_late, 2, 2.0)
    assert first.startswith("LostRankError: ranks waited for each other for 2 s (--dist-timeout-s); late: rank 1 on ")
    assert second != "came"


def _killed(folder: str) -> str:
    with session(ClusterConfig(device="cpu")) as world:
        world.barrier()
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            world.barrier()
        except RuntimeError as error:
            told = world.explained(error)
            Path(folder, f"rank{world.rank}").write_text(f"{type(told).__name__}: {told}")
            raise told from error
    return "came"


def test_of_all_ranks_one_says_who_was_killed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="died with exit code -9"):
        run_ranks(_killed, 3, str(tmp_path))
    said = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert said["rank0"].startswith(f"{LostRankError.__name__}: rank 1 on ") and "is gone" in said["rank0"]
    assert said["rank2"].startswith("PeerError: rank 1 on ")
