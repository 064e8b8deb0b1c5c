"""SIGKILL at random moments and inside every write, over and over; at the end the run is the one never killed."""

from __future__ import annotations

import os
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.course import Attempt, Course, assert_same_run, run_whole, saved_steps, uploaded_steps, write_data
from tests.helpers.kill_points import ONCE, PLACES, REMOTE, WRITING, arm
from tests.helpers.nursery import Child, Nursery

COURSES = (
    Course("often", flags=("--save-every-n-steps", "1", "--keep-last", "2")),
    Course(
        "two ranks", world_size=2, flags=("--save-every-n-steps", "2", "--keep-last", "1", "--val-every-n-steps", "4")
    ),
    Course("workers", workers=2, flags=("--save-every-n-steps", "1", "--delete-previous-checkpoint")),
    Course("remote", epochs=6, flags=("--save-every-n-steps", "1", "--keep-last", "1"), remote=True),
    Course("rarely", epochs=6, flags=("--save-every-n-steps", "4", "--save-frequency", "2")),
    Course("two ranks, a worker each", world_size=2, workers=1, flags=("--save-every-n-steps", "1")),
)
MOMENT = "any moment"


class Tormentor:
    """Kills runs of one course after another until there were `kills`; keeps the count of where."""

    def __init__(self, nursery: Nursery, data: Path, home: Path, seed: int):
        self.nursery, self.data, self.home = nursery, data, home
        self.draw = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.tries: Counter[str] = Counter()  # a run may end before it has passed its place often enough
        self.runs: Counter[str] = Counter()
        self.lost_disks = self.scraps = 0
        self._whole: dict[str, Attempt] = {}

    def torment(self, course: Course, kills: int) -> None:
        """`kills` in runs of this course, each of which ends as the uninterrupted one."""
        goal = self.kills.total() + kills
        if course.name not in self._whole:
            self._whole[course.name] = run_whole(self.nursery, course, self.data, self.home / f"whole {course.name}")
        while self.kills.total() < goal:
            attempt = Attempt(course, self.data, self.home / f"{course.name} {self.runs[course.name]}")
            while not self._live(attempt, last=self.kills.total() >= goal):
                pass
            assert_same_run(attempt, self._whole[course.name])
            self.runs[course.name] += 1
            self.scraps += attempt.scraps
            attempt.forget()

    def _live(self, attempt: Attempt, last: bool) -> bool:
        """One start and its end; True when the run has come to its own end."""
        before, place = self._lose_disk(attempt), self._choose(attempt.course)
        victim = 0 if place in (*WRITING, *REMOTE) else self.draw.randrange(attempt.course.world_size)
        hits = attempt.home / "hits"
        prepare = [[] for _ in range(attempt.course.world_size)]
        if place != MOMENT and not last:
            passes = 1 if place in ONCE else self.draw.choice((1, 2, 3, 5))
            prepare[victim] = [(arm, (place, passes, str(attempt.run_dir), str(hits)))]
        children = attempt.start(self.nursery, prepare)
        if place == MOMENT and not last:
            time.sleep(self.draw.uniform(0, 1.2))
            children[victim].kill()
        codes = self._end(children, victim)
        self._check(attempt, children, before)
        if codes == [0] * len(codes):
            return True
        # Killed behind the last agreement, a rank leaves the others nothing to miss.
        assert all(codes) or attempt.newest() == attempt.course.num_steps, codes
        assert codes[victim] == -9 and not last, f"{codes}\n" + "\n".join(child.output for child in children)
        self.kills[place] += 1
        return False

    def _lose_disk(self, attempt: Attempt) -> int:
        """Every third time a run with a remote loses its own folder. The step to which it has come for sure."""
        if not attempt.course.remote or self.draw.random() < 2 / 3:
            return attempt.newest()
        shutil.rmtree(attempt.run_dir, ignore_errors=True)
        self.lost_disks += 1
        return attempt.newest_at_remote()

    def _choose(self, course: Course) -> str:
        """A third at any moment, the rest at the place that was tried least."""
        if self.draw.random() < 1 / 3:
            return MOMENT
        # Half of the time the places at a remote, which few courses have.
        places = REMOTE if course.remote and self.draw.random() < 1 / 2 else PLACES
        fewest = min(self.tries[place] for place in places)
        place = self.draw.choice([place for place in places if self.tries[place] == fewest])
        self.tries[place] += 1
        return place

    def _end(self, children: list[Child], victim: int) -> list[int]:
        """The exit codes. The other ranks die with the first, or are left to find out for themselves."""
        together = self.draw.random() < 0.7
        first = children[victim].finish()
        if first and together:
            return [child.kill() for child in children]
        return [child.finish() for child in children]

    def _check(self, attempt: Attempt, children: list[Child], before: int) -> None:
        """What is there after every end: whole checkpoints, none older than what was saved, and nothing else."""
        attempt.assert_nothing_leaks(children)
        here, there = attempt.newest(), attempt.newest_at_remote()
        assert here >= max([-1, *saved_steps(children[0].output)])
        assert there >= max([-1, *uploaded_steps(children[0].output)])
        assert max(here, there) >= before

    def table(self) -> str:
        """Where the kills were."""
        lines = [f"{count:6d}  {place}" for place, count in sorted(self.kills.items(), key=lambda item: -item[1])]
        runs = ", ".join(f"{count} x {name}" for name, count in self.runs.items())
        disks = f"{self.lost_disks} times the run folder was lost" if self.lost_disks else "no run folder was lost"
        scraps = f"a scratch folder or semaphore was left {self.scraps} times"
        return "\n".join([f"{self.kills.total()} kills in {self.runs.total()} runs ({runs})", disks, scraps, *lines])


def _torment(tmp_path: Path, kills: int, courses: tuple[Course, ...], share: int) -> Tormentor:
    write_data(tmp_path / "data")
    with Nursery() as nursery:
        tormentor = Tormentor(nursery, tmp_path / "data", tmp_path, seed=kills)
        while tormentor.kills.total() < kills:
            for course in courses:
                tormentor.torment(course, share)
                _tell(f"{tormentor.table()}\n\n")
    return tormentor


def _tell(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@pytest.mark.slow
def test_a_run_killed_dozens_of_times_is_bitwise_the_uninterrupted_one(tmp_path: Path) -> None:
    tormentor = _torment(tmp_path, kills=24, courses=COURSES[:4], share=6)
    assert len(tormentor.kills) > 8, tormentor.table()


@pytest.mark.torture
def test_runs_killed_a_thousand_times_are_bitwise_the_uninterrupted_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    with capsys.disabled():
        tormentor = _torment(tmp_path, int(os.environ.get("KILLS", "1000")), COURSES, share=25)
        _tell(f"\n{tormentor.table()}\nin {(time.monotonic() - started) / 60:.0f} minutes\n")
    assert not {*PLACES, *REMOTE, MOMENT} - set(tormentor.kills), tormentor.table()
