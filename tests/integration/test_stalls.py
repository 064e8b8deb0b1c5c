"""Ranks and workers that hang, are stopped or killed: who is named, and how all ranks end. Through the program."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.process import Finished, Running, start_ranks, start_torchrun, start_training
from tests.helpers.shards import write_shards
from tests.integration.test_training import TINY, losses
from training.checkpoint_files import find_latest

pytestmark = pytest.mark.slow

STALL_S = 3
FLAGS = [*TINY, "--epochs", "10", "--save-every-n-steps", "4", "--stall-timeout", str(STALL_S)]
REPORT_S = 40.0  # to wait for a report: starting, on a busy machine
END_S = 60.0  # in which all ranks must be down


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """96 samples: 12 steps an epoch on one rank, 6 on two."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [16] * 6)
    return f"{folder}/shard-{{00000..00005}}.tar"


def flags(logs: Path, data: str, *more: str, name: str = "run") -> list[str]:
    return [*FLAGS, "--train-data", data, "--logs-dir", str(logs), "--name", name, *more]


def two_ranks(
    module: list[str], *args: str, env: dict[str, str] | None = None
) -> contextlib.AbstractContextManager[list[Running]]:
    """`python -m MODULE` twice, with nobody who ends one when the other has ended."""
    return start_ranks(2, *args, module=module, env=env)


def sabotaged(fault: str, *args: str, env: dict[str, str] | None = None) -> contextlib.AbstractContextManager:
    """Two ranks, of which rank 1 misbehaves at its 9th step."""
    return two_ranks(["tests.helpers.sabotage", fault, "1", "9"], *args, env=env)


def children(pid: int) -> list[int]:
    """All processes that descend from `pid`."""
    parents = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    direct = [child for child, parent in parents.items() if parent == pid]
    return direct + [below for child in direct for below in children(child)]


def named(pids: list[int], name: str) -> list[int]:
    """Those processes that have `name`; torch names its loader workers."""
    return sorted(pid for pid in pids if Path(f"/proc/{pid}/comm").read_text().strip() == name)


def ranks_of(agent: int) -> dict[int, int]:
    """The processes of the ranks below a torchrun, by rank."""
    found = {}
    for pid in children(agent):
        with contextlib.suppress(OSError):
            env = dict(
                part.split("=", 1) for part in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in part
            )
            command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            if "-m training.main" in command and "RANK" in env:
                found.setdefault(int(env["RANK"]), pid)
    return found


def ended_with(running: Running, code: int) -> Finished:
    """The end of a rank; never a traceback of a mistake that nobody made."""
    finished = running.finish(END_S).expect(code)
    assert "please report it" not in finished.output and "Traceback" not in finished.output
    return finished


def assert_checkpoint_is_whole(logs: Path) -> None:
    found, passed_over = find_latest(logs / "run" / "checkpoints")
    assert found is not None and passed_over == []


def test_a_stopped_loader_worker_is_named_and_the_run_goes_on_when_it_does(shards: str, tmp_path: Path) -> None:
    with start_training(*flags(tmp_path, shards, "--workers", "2")) as running:
        running.wait_for(r"^step 20/")
        worker = named(children(running.process.pid), "pt_data_worker")[-1]
        os.kill(worker, signal.SIGSTOP)
        running.wait_for(rf"loader worker \d \(pid {worker}\) is stopped; .*, at \d+ of .*shard-0000\d\.tar", REPORT_S)
        report = running.output
        os.kill(worker, signal.SIGCONT)
        running.wait_for(r"^there is progress again, at step \d+ ", REPORT_S)
        running.finish().expect(0)
    assert re.search(r"^no progress for \d+ s$", report, re.MULTILINE)
    assert "data/loader.py" in report and "feed.py" in report
    with start_training(*flags(tmp_path, shards, "--workers", "0", name="quiet")) as running:
        assert "no progress" not in running.finish().expect(0).output
    assert losses(tmp_path) == losses(tmp_path, "quiet")


def test_the_rank_whose_worker_is_stopped_is_late_and_not_the_one_that_waits(shards: str, tmp_path: Path) -> None:
    with start_torchrun(2, *flags(tmp_path, shards, "--workers", "1")) as running:
        running.wait_for(r"^step 12/")
        (worker,) = named(children(ranks_of(running.process.pid)[1]), "pt_data_worker")
        os.kill(worker, signal.SIGSTOP)
        began = time.monotonic()
        running.wait_for(r"no progress for \d+ s: rank 1 is late, the others wait$", REPORT_S)
        took = time.monotonic() - began
        running.wait_for(rf"^rank 1 on .*:\n(  .*\n)+  loader worker 0 \(pid {worker}\) is stopped; ", 5)
        os.kill(worker, signal.SIGCONT)
        output = running.finish().expect(0).output
    assert took < STALL_S + 15
    assert re.search(r"^  1 .* data .*shard-0000\d\.tar +\d+\n  0 .* data, waits", output, re.MULTILINE)
    assert "there is progress again" in (tmp_path / "run" / "train.log").read_text()
    with two_ranks(["training.main"], *flags(tmp_path, shards, name="quiet")) as ranks:
        for rank in ranks:
            rank.finish().expect(0)
    assert losses(tmp_path) == losses(tmp_path, "quiet")


def test_a_stopped_rank_is_named_as_silent_and_not_given_up_even_rank_0(shards: str, tmp_path: Path) -> None:
    with two_ranks(["training.main"], *flags(tmp_path, shards)) as (first, second):
        first.wait_for(r"^step 12/")
        second.signal(signal.SIGSTOP)
        first.wait_for(r"rank 1 is late, the others wait; silent: 1$", REPORT_S)
        first.wait_for(r"does not answer; no heartbeat for \d+ s or more: its process is stopped$", REPORT_S)
        second.signal(signal.SIGCONT)
        first.wait_for(r"^there is progress again", REPORT_S)
        # Rank 0 cannot report itself; rank 1 does.
        first.signal(signal.SIGSTOP)
        second.wait_for(r"no progress for \d+ s, and rank 0 has been silent for ", REPORT_S)
        first.signal(signal.SIGCONT)
        for rank in (first, second):
            ended_with(rank, 0)


def test_the_report_shows_where_python_stands_on_the_late_rank(shards: str, tmp_path: Path) -> None:
    release = tmp_path / "release"
    with sabotaged("pause-in-data", *flags(tmp_path, shards), env={"RELEASE": str(release)}) as (first, second):
        first.wait_for(
            r"^rank 1 on .*:\n  main thread\n(    .*\n)*    helpers/sabotage.py:\d+ held_up_for_a_", REPORT_S
        )
        release.touch()
        ended_with(first, 0)
        # One rank speaks for all.
        assert "no progress" not in ended_with(second, 0).output


def test_what_hangs_for_good_ends_at_the_time_out_after_a_report(shards: str, tmp_path: Path) -> None:
    with sabotaged("hang-in-data", *flags(tmp_path, shards, "--dist-timeout-s", "8")) as (first, second):
        output = ended_with(first, 1).output
        ended_with(second, 1)
    assert "rank 1 is late, the others wait" in output
    assert re.search(
        r"^error: ranks waited for each other for 8 s \(--dist-timeout-s\); late: rank 1 on ", output, re.M
    )
    assert_checkpoint_is_whole(tmp_path)


def test_a_killed_rank_takes_the_other_along_which_names_it(shards: str, tmp_path: Path) -> None:
    with two_ranks(["training.main"], *flags(tmp_path, shards, "--epochs", "1000")) as (first, second):
        first.wait_for(r"^step 12/")
        time.sleep(4)  # some heartbeats of the steps: there is one a second
        second.signal(signal.SIGKILL)
        output = ended_with(first, 1).output
    pid = second.process.pid
    assert re.search(rf"^error: rank 1 on \S+ \(pid {pid}\) is gone, last heard of at step \d+ ", output, re.MULTILINE)
    assert f"(pid {pid}) is gone" in (tmp_path / "run" / "train.log").read_text()
    assert_checkpoint_is_whole(tmp_path)


def test_a_rank_that_waits_for_its_data_ends_too_when_another_is_killed(shards: str, tmp_path: Path) -> None:
    with two_ranks(["tests.helpers.sabotage", "hang-in-data", "0", "9"], *flags(tmp_path, shards)) as (first, second):
        first.wait_for(r"^no progress for \d+ s: rank 0 is late", REPORT_S)
        second.signal(signal.SIGKILL)
        assert re.search(r"^error: rank 1 on \S+ \(pid \d+\) is gone", ended_with(first, 1).output, re.MULTILINE)


def test_when_rank_0_is_killed_the_next_one_says_so(shards: str, tmp_path: Path) -> None:
    with two_ranks(["training.main"], *flags(tmp_path, shards)) as (first, second):
        first.wait_for(r"^step 12/")
        first.signal(signal.SIGKILL)
        assert re.search(r"^error: rank 0\b.* is gone", ended_with(second, 1).output, re.MULTILINE)
    assert_checkpoint_is_whole(tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_a_step_of_one_rank_ends_all_with_its_exit_code(shards: str, tmp_path: Path, rank: int) -> None:
    module = ["tests.helpers.sabotage", "config-error-in-step", str(rank), "9"]
    with two_ranks(module, *flags(tmp_path, shards)) as ranks:
        outputs = [one.finish(END_S).expect(2).output for one in ranks]
    assert "error: no such thing\n" in outputs[rank]
    said = rf"^error: rank {rank} on \S+ ended: ConfigError: no such thing$"
    assert re.search(said, outputs[1 - rank], re.MULTILINE)
    assert_checkpoint_is_whole(tmp_path)


def test_an_error_that_all_ranks_agree_on_is_said_once_as_before(shards: str, tmp_path: Path) -> None:
    with sabotaged("data-error", *flags(tmp_path, shards)) as (first, second):
        assert "error:" not in ended_with(first, 1).output
        assert "error: not for sharing" in ended_with(second, 1).output
