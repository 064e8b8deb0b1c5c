"""A signal to one rank, at any moment: all save together, end with 75, and the resumed run is the uninterrupted one."""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.course import Attempt, Course, assert_same_run, run_whole, write_data
from tests.helpers.kill_points import ONCE, PLACES, WRITING, arm, samples_noted
from tests.helpers.nursery import Child, Nursery
from tests.helpers.process import poll
from training.main import main
from training.preemption import Preemption

COURSES = (
    Course("two ranks", world_size=2, epochs=4, flags=("--save-every-n-steps", "3", "--keep-last", "1")),
    Course("two ranks, a worker each", world_size=2, workers=1, epochs=4, flags=("--save-frequency", "2")),
    Course("one rank", workers=1, epochs=4, flags=("--zeroshot-every-n-steps", "4", "--evaluate-first")),
)
NUMBERS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1)
MOMENT = "any moment"


class Preemptor:
    """Sends signals to runs of one course after another; keeps the count of where."""

    def __init__(self, nursery: Nursery, home: Path, seed: int):
        self.nursery, self.home = nursery, home
        self.draw = random.Random(seed)
        self.signals: Counter[str] = Counter()
        self.runs: Counter[str] = Counter()
        self._whole: dict[str, Attempt] = {}
        write_data(home / "data")

    def disturb(self, course: Course, signals: int) -> None:
        """One run of the course with that many signals on its way to the end."""
        if course.name not in self._whole:
            self._whole[course.name] = run_whole(self.nursery, course, self.home / "data", self.home / course.name)
        attempt = Attempt(course, self.home / "data", self.home / f"{course.name} {self.runs[course.name]}")
        codes = [self._live(attempt, self._choose()) for _ in range(signals)]
        assert set(codes) <= {75, 0}
        assert self._live(attempt, None) == 0
        assert_same_run(attempt, self._whole[course.name])
        self.runs[course.name] += 1
        attempt.forget()

    def _choose(self) -> str:
        if self.draw.random() < 0.5:
            return MOMENT
        fewest = min(self.signals[place] for place in PLACES)
        return self.draw.choice([place for place in PLACES if self.signals[place] == fewest])

    def _live(self, attempt: Attempt, place: str | None) -> int:
        """One start with a signal at `place`, if any; the exit code of all ranks."""
        before, size = attempt.newest(), attempt.course.world_size
        victim, number = self.draw.randrange(size), self.draw.choice(NUMBERS)
        prepare: list[list[Any]] = [[] for _ in range(size)]
        hits = attempt.home / "hits"
        hits.unlink(missing_ok=True)
        if place not in (None, MOMENT):
            victim = 0 if place in WRITING else victim
            passes = 1 if place in ONCE else self.draw.choice((1, 2, 4))
            prepare[victim].append((arm, (place, passes, str(attempt.run_dir), str(hits), number)))
        children = attempt.start(self.nursery, prepare)
        if place == MOMENT:
            self._signal_some_time(children[victim], number)
        codes = [child.finish() for child in children]
        output = "\n".join(child.output for child in children)
        assert len(set(codes)) == 1, f"{place}: {codes}\n{output}"
        attempt.assert_nothing_leaks(children)
        self._check(attempt, codes[0], before, f"{place}, {number!r} to rank {victim}\n{output}")
        self.signals[place or "none"] += place == MOMENT or hits.exists()
        return codes[0]

    def _signal_some_time(self, child: Child, number: int) -> None:
        """Once or twice, to the program or to its loader's processes too."""
        time.sleep(self.draw.uniform(0, 1.2))
        child.signal(number, group=self.draw.random() < 0.5)
        if self.draw.random() < 0.3:
            time.sleep(self.draw.uniform(0, 0.1))
            child.signal(self.draw.choice(NUMBERS))

    def _check(self, attempt: Attempt, code: int, before: int, what: str) -> None:
        """Every step that was made is in a checkpoint."""
        made = [max(samples_noted(attempt.samples_file(rank)), default=-1) for rank in range(attempt.course.world_size)]
        assert attempt.newest() == max(before, *made) or code == 0, f"{made}, saved {attempt.newest()}: {what}"
        assert "Traceback" not in what and "error" not in what, what

    def table(self) -> str:
        """Where the signals came."""
        lines = [f"{count:6d}  {place}" for place, count in sorted(self.signals.items(), key=lambda item: -item[1])]
        return "\n".join([f"{self.signals.total()} signals in {self.runs.total()} runs:", *lines])


def test_a_stop_before_the_first_step_saves_nothing_again_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path / "data")
    attempt = Attempt(Course("one rank", epochs=1), tmp_path / "data", tmp_path)

    def start(*flags: str) -> tuple[int, list[str]]:
        code = main([*attempt.argv(), *flags])
        return code, [path.read_text() for path in sorted(attempt.checkpoints.glob("*/manifest.json"))]

    with monkeypatch.context() as patch:
        patch.setattr(Preemption, "requested", lambda self: "signal SIGTERM")
        assert start() == (75, [])
        assert "stopped (signal SIGTERM) before the first step: there is nothing to save" in capsys.readouterr().err
    code, saved = start("--stop-after-steps", "2")
    assert (code, len(saved)) == (75, 1)
    with monkeypatch.context() as patch:
        # The last question before the first step is the feed's.
        answers = iter([None] * 3)
        patch.setattr(Preemption, "requested", lambda self: next(answers, "signal SIGTERM"))
        assert start() == (75, saved)
    assert start()[0] == 0


@pytest.mark.slow
def test_runs_preempted_at_any_moment_are_bitwise_the_uninterrupted_ones(tmp_path: Path) -> None:
    with Nursery() as nursery:
        preemptor = Preemptor(nursery, tmp_path, seed=1)
        for course in COURSES:
            preemptor.disturb(course, signals=8)
    assert len(preemptor.signals) > 8, preemptor.table()


@pytest.mark.torture
def test_runs_preempted_hundreds_of_times_are_bitwise_the_uninterrupted_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number, started = int(os.environ.get("KILLS", "1000")) // 4, time.monotonic()
    with Nursery() as nursery, capsys.disabled():
        preemptor = Preemptor(nursery, tmp_path, seed=number)
        while preemptor.signals.total() < number:
            for course in COURSES:
                preemptor.disturb(course, signals=8)
        sys.stdout.write(f"\n{preemptor.table()}\nin {(time.monotonic() - started) / 60:.0f} minutes\n")


@pytest.mark.slow
def test_a_chain_of_jobs_that_end_soon_is_bitwise_the_uninterrupted_run(tmp_path: Path) -> None:
    course = Course("short jobs", epochs=8, flags=("--save-frequency", "4"))
    write_data(tmp_path / "data")
    with Nursery() as nursery:
        whole = run_whole(nursery, course, tmp_path / "data", tmp_path / "whole")
        attempt = Attempt(course, tmp_path / "data", tmp_path / "chain")
        output, jobs = "", 0
        for jobs in range(1, 60):
            end = time.time() + 0.8 * jobs**0.5  # a busy machine makes no step in the first ones
            (child,) = attempt.start(nursery, env={"CLIPYARD_END_TIME": str(end)})
            code = child.finish()
            output += child.output
            if code == 0:
                break
            assert code == 75, child.output
        assert_same_run(attempt, whole)
    assert jobs > 1
    assert re.search(r"^stopped \(the job ends in \d+ s\), everything is saved$", output, re.MULTILINE)


@pytest.mark.torture
def test_a_signal_to_all_processes_of_a_job_that_compiles_is_outlived(tmp_path: Path) -> None:
    """Compilers are children of the run; one that the signal ended would end the run with an error."""
    course = Course("compiled", epochs=1, flags=("--torchcompile",))
    write_data(tmp_path / "data")
    with Nursery() as nursery:
        attempt = Attempt(course, tmp_path / "data", tmp_path / "compiled")
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        (child,) = attempt.start(nursery, env=cache)
        poll(lambda: [path for path in child.session() if b"cc1plus" in _command(path)], 300, "a compiler")
        # Again and again: some of what is compiled first is only a trial, which may fail.
        while nursery.exit_code(child.pid, timeout_s=0.05) is None:
            child.signal(signal.SIGTERM, group=True)
        assert child.finish() == 75, child.output
        assert attempt.newest() == 1
        assert [c.finish(900) for c in attempt.start(nursery, env=cache)] == [0]
    assert len(samples_noted(attempt.samples_file(0))) == course.num_steps


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""
