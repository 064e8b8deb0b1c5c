"""Loader workers seen from outside: what they note, how a stopped one shows, where a hanging one stands."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data.loader import TrainLoader
from data.worker_status import Doing, Note, Pages, WorkerState, process_state, stack_of
from tests.data.test_loader import build, config_of
from tests.helpers.process import poll
from tests.helpers.shards import write_shards


def test_a_note_is_read_as_it_was_written_and_secrets_are_masked() -> None:
    pages = Pages(2)
    pages.note(1).write(Doing.PREPARING, "https://user:secret@host/a.tar", "0007")
    unborn, one = pages.look(with_stacks=False)
    assert (unborn.process, unborn.pid) == ("not yet started", 0)
    assert (one.number, one.pid, one.doing, one.sample) == (1, os.getpid(), "preparing", "0007")
    assert "a.tar" in one.shard and "secret" not in one.shard
    assert one.process in ("running", "sleeping") and 0 <= one.seconds < 60


def test_a_shorter_note_leaves_nothing_of_a_longer_one_and_a_too_long_one_is_cut() -> None:
    pages = Pages(1)
    note = pages.note(0)
    note.write(Doing.READING, "s" * 100_000, "x" * 100_000)
    (seen,) = pages.look(False)
    assert set(seen.shard) == {"s"} and set(seen.sample) == {"x"}
    note.write(Doing.AHEAD, "short", "1")
    (seen,) = pages.look(False)
    assert (seen.shard, seen.sample) == ("short", "1")


def test_a_worker_stopped_in_the_midst_of_a_note_is_seen_all_the_same() -> None:
    pages = Pages(1)
    note = pages.note(0)
    note.write(Doing.PREPARING, "shard", "1")
    note._count()
    assert pages.look(False)[0].shard == "shard"


@pytest.fixture
def loader(tmp_path: Path):  # type: ignore[no-untyped-def]
    shards = write_shards(tmp_path, [8] * 4)
    with build(config_of(shards, workers=2, batch_size=4, resampled=True)) as loader:
        next(loader)
        yield loader


def states(loader: TrainLoader, accept: Callable[[WorkerState], bool], with_stacks: bool = False) -> list[WorkerState]:
    """The states of the workers, once all of them are acceptable."""

    def look() -> list[WorkerState] | None:
        found = loader.workers(with_stacks)
        return found if all(map(accept, found)) else None

    return poll(look, 30, "workers in that state")


def test_workers_that_are_ahead_say_so_and_name_their_last_sample(loader: TrainLoader) -> None:
    found = states(loader, lambda state: state.is_idle)
    assert [state.number for state in found] == [0, 1]
    assert len({state.pid for state in found}) == 2
    assert all(state.shard.endswith(".tar") and state.sample for state in found)


def test_a_worker_says_where_it_stands_and_goes_on(loader: TrainLoader) -> None:
    found = states(loader, lambda state: bool(state.stack), with_stacks=True)
    assert all("main thread" in state.stack for state in found)
    assert any("worker.py" in line for line in found[0].stack)
    for _ in range(8):
        next(loader)


def test_a_stopped_worker_shows_at_once_and_is_not_asked(loader: TrainLoader) -> None:
    states(loader, lambda state: state.is_idle)
    pid = loader.workers()[1].pid
    os.kill(pid, signal.SIGSTOP)
    poll(lambda: process_state(pid) == "stopped", 10, "stop")
    try:
        began = time.monotonic()
        stopped = loader.workers(with_stacks=True)[1]
        assert (stopped.process, stopped.stack, stopped.is_idle) == ("stopped", (), False)
        assert time.monotonic() - began < 10
    finally:
        os.kill(pid, signal.SIGCONT)
    for _ in range(8):
        next(loader)


def test_a_worker_that_waits_for_its_storage_names_the_shard(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [8])
    stalling = f"pipe:head -c 4096 {shard}; sleep 600"
    with build(config_of([stalling], workers=1, batch_size=4, resampled=True)) as loader:
        loader._parts = loader._start_parts()
        found = states(loader, lambda state: state.doing == "reading" and state.shard != "", with_stacks=True)
        assert str(shard) in found[0].shard and found[0].sample.startswith("number ")
        assert not found[0].is_idle
        stack = states(loader, lambda state: "reading thread" in state.stack, with_stacks=True)[0].stack
        assert any("data/pipe.py" in line or "data/tar.py" in line for line in stack)


def test_without_workers_the_loader_describes_its_own_process(tmp_path: Path) -> None:
    with build(config_of(write_shards(tmp_path, [8]), workers=0, batch_size=4)) as loader:
        next(loader)
        (own,) = loader.workers(with_stacks=True)
        assert (own.pid, own.stack) == (os.getpid(), ())


def test_a_process_that_is_gone_is_gone() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    poll(lambda: process_state(pid) == "dead", 10, "a dead process")
    os.waitpid(pid, 0)
    assert process_state(pid) == "gone"


def test_of_a_dump_the_main_thread_and_busy_reading_threads_remain() -> None:
    dump = """Thread 0x00007f01 (most recent call first):
  File "/x/python3.11/queue.py", line 3 in get
  File "/y/data/background.py", line 5 in _serve
Thread 0x00007f02 (most recent call first):
  File "/y/data/pipe.py", line 7 in read
  File "/y/data/background.py", line 9 in _do
Current thread 0x00007f03 (most recent call first):
  File "/y/data/worker.py", line 2 in parts
  File "/x/loop.py", line 1 in <module>
"""
    assert stack_of(dump) == (
        *("reading thread", "  data/background.py:9 _do", "  data/pipe.py:7 read"),
        *("main thread", "  x/loop.py:1 <module>", "  data/worker.py:2 parts"),
    )


def test_a_note_in_a_process_without_shared_memory_costs_no_more_than_a_few_microseconds() -> None:
    note = Note()
    began = time.process_time()
    for _ in range(10_000):
        note.write(Doing.PREPARING, "s3://bucket/00000.tar", "000001234")
    # A picture takes a hundred times as long to decode; the limit leaves room for a busy machine.
    assert time.process_time() - began < 1.0
