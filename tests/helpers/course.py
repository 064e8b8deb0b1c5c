"""A run that is to be disturbed: its data, its command, and what it must be in the end. Knows nothing of disturbances.

The measure is the same command undisturbed: the lines of metrics.jsonl but for times, the samples of every step on
every rank, and the last checkpoint's weights, moments and data position, all to the last bit.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.gloo import free_port
from tests.helpers.kill_points import note_samples, samples_noted
from tests.helpers.nursery import Child, Nursery, Order, ranks, shm_prefix
from tests.helpers.process import environment
from tests.helpers.shards import SHAPES, draw_image, write_shards
from training.checkpoint_files import find_latest, verify_checkpoint

MODEL = """
embed_dim: 16
vision_cfg: {image_size: 32, layers: 1, width: 16, head_width: 16, patch_size: 16}
text_cfg: {context_length: 12, vocab_size: 49408, width: 8, heads: 1, layers: 1}
"""
SHARDS = (16, 16, 16)
GLOBAL_BATCH = 8
STEPS_AN_EPOCH = sum(SHARDS) // GLOBAL_BATCH
TIMES = re.compile(r"time|train/(samples_per_second.*|window_steps|(data|batch|checkpoint|evaluation|job)_time)")
Prepare = tuple[Callable[..., None], tuple[Any, ...]]


@dataclass(frozen=True)
class Course:
    """One way to run: number of ranks, loader workers of each, epochs, and what else is on the command line."""

    name: str
    world_size: int = 1
    workers: int = 0
    epochs: int = 5
    flags: tuple[str, ...] = ()
    remote: bool = False  # with a second copy at a path

    @property
    def num_steps(self) -> int:
        """Of the whole run."""
        return self.epochs * STEPS_AN_EPOCH


def write_data(folder: Path) -> None:
    """Model, training shards, pairs and labelled pictures."""
    write_shards(folder / "shards", SHARDS)
    write_shards(folder / "pairs", [10])
    (folder / "model.yaml").write_text(MODEL)
    for number, shape in enumerate(SHAPES):
        (folder / "labelled" / shape).mkdir(parents=True)
        for copy in range(2):
            draw_image(8 * (number + copy * len(SHAPES))).save(folder / "labelled" / shape / f"{copy}.png")


@dataclass
class Attempt:
    """A run folder with the command that goes on in it, however often."""

    course: Course
    data: Path
    home: Path  # run folder, logs and notes
    scratch: Path | None = None  # TMPDIR of its processes
    starts: int = 0
    scraps: int = 0

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.home / "run"

    @property
    def remote(self) -> Path:
        """Where the second copy goes."""
        return self.home / "remote"

    @property
    def checkpoints(self) -> Path:
        """Its checkpoints."""
        return self.run_dir / "checkpoints"

    def start(
        self,
        nursery: Nursery,
        prepare: Sequence[Sequence[Prepare]] = (),
        env: dict[str, str] | None = None,
        flags: Sequence[str] = (),
    ) -> list[Child]:
        """All ranks, just started; `prepare` is by rank."""
        self.starts += 1
        self.home.mkdir(parents=True, exist_ok=True)
        self.scratch = self.scratch or nursery.new_folder()
        port, children = free_port(), []
        for rank, place in enumerate(ranks(self.course.world_size, port)):
            note = (note_samples, (str(self.samples_file(rank)),))
            log = self.home / f"start{self.starts}.rank{rank}.log"
            variables = environment({"TMPDIR": str(self.scratch), "OMP_NUM_THREADS": "1"} | place | (env or {}))
            mine = tuple(prepare[rank]) if prepare else ()
            children.append(nursery.start(Order((*self.argv(), *flags), str(log), variables, (note, *mine))))
        return children

    def samples_file(self, rank: int) -> Path:
        """Where a rank notes which samples it consumed."""
        return self.home / f"samples.rank{rank}.jsonl"

    def argv(self) -> tuple[str, ...]:
        """The command line."""
        course, data = self.course, self.data
        return (
            *("--model", str(data / "model.yaml"), "--precision", "fp32", "--device", "cpu", "--seed", "3"),
            *("--batch-size", str(GLOBAL_BATCH // course.world_size), "--workers", str(course.workers)),
            *("--epochs", str(course.epochs), "--warmup", "2", "--lr", "1e-3", "--resume", "latest"),
            *("--train-data", f"{data}/shards/shard-{{00000..{len(SHARDS) - 1:05d}}}.tar"),
            *("--val-data", f"{data}/pairs/shard-00000.tar", "--val-frequency", "1"),
            *("--zeroshot-data", f"shapes={data}/labelled", "--zeroshot-frequency", "2"),
            *("--rendezvous-timeout-s", "30"),  # what a rank waits for one that was killed before it came
            *("--log-every-n-steps", "1", "--progress", "lines", "--logs", str(self.home), "--name", "run"),
            *course.flags,
            *(("--remote-sync", str(self.remote)) if course.remote else ()),
        )

    def forget(self) -> None:
        """Delete its folder."""
        shutil.rmtree(self.home)

    # ---- what is left of it

    def newest(self) -> int:
        """The step of the newest checkpoint, -1 for none. AssertionError where a newer one does not verify."""
        folder, passed_over = find_latest(self.checkpoints)
        assert passed_over == [], passed_over
        return -1 if folder is None else verify_checkpoint(folder, checksums=False).step

    def newest_at_remote(self) -> int:
        """The same at the remote, where a folder without a manifest is none yet, or none any more."""
        folders = [path.parent for path in (self.remote / "run" / "checkpoints").glob("*/manifest.json")]
        return max((verify_checkpoint(folder).step for folder in folders), default=-1)

    def leftovers(self, children: Sequence[Child]) -> list[Path]:
        """Processes, shared memory and scratch files of runs that have ended."""
        assert self.scratch is not None, "not started"
        names = tuple(name for child in children for name in (f"sem.{shm_prefix(child.pid)}", f"torch_{child.pid}_"))
        found = [path for path in Path("/dev/shm").iterdir() if path.name.startswith(names)]
        return [*(path for child in children for path in child.session()), *found, *self.scratch.iterdir()]

    def assert_nothing_leaks(self, children: Sequence[Child], within_s: float = 30.0) -> None:
        """No process and no shared memory: workers notice within moments that their trainer is gone.

        They also remove its scratch folder. Where it dies before they are there, or after it has ended them, that
        folder stays; before, names of semaphores do too. `scraps` counts these cases.
        """
        began = re.search("^step ", children[0].output, re.MULTILINE) is not None
        deadline = time.monotonic() + within_s
        while left := self.leftovers(children):
            scraps = [path for path in left if path.parent == self.scratch or not (began or path.parts[1] == "proc")]
            if scraps == left:
                _remove(scraps)
                self.scraps += 1
                return
            assert time.monotonic() < deadline, f"left behind by a run that has ended: {list(map(_describe, left))}"
            time.sleep(0.01)


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _describe(path: Path) -> str:
    command = path / "cmdline"
    return f"{path} {command.read_text()!r}" if command.exists() else str(path)


def saved_steps(output: str) -> Iterator[int]:
    """The steps of which the console says that they are saved."""
    return _steps(r"^saved .+/(epoch|step)_(\d+): ", output)


def uploaded_steps(output: str) -> Iterator[int]:
    """The steps of which the console says that they are at the remote."""
    return _steps(r"^uploaded (epoch|step)_(\d+) to ", output)


def _steps(pattern: str, output: str) -> Iterator[int]:
    for kind, number in re.findall(pattern, output, re.MULTILINE):
        yield int(number) * (STEPS_AN_EPOCH if kind == "epoch" else 1)


def figures(attempt: Attempt) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times, which no two runs share."""
    lines = (attempt.run_dir / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not TIMES.fullmatch(key)} for line in lines]


def assert_same_run(attempt: Attempt, whole: Attempt) -> None:
    """`attempt` has ended as `whole`, the undisturbed run of the same course, did."""
    course = attempt.course
    lines = figures(attempt)
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, course.num_steps + 1))
    for ours, theirs in zip(lines, figures(whole), strict=True):
        assert ours == theirs
    for rank in range(course.world_size):
        # Sets of one: a step that was repeated consumed the same samples again.
        assert samples_noted(attempt.samples_file(rank)) == samples_noted(whole.samples_file(rank))
    last = f"epoch_{course.epochs}"
    for name in ("model.safetensors", "optimizer.safetensors", "data.json"):
        ours, theirs = ((a.checkpoints / last / name).read_bytes() for a in (attempt, whole))
        assert ours == theirs, f"{last}/{name} differs"


def run_whole(nursery: Nursery, course: Course, data: Path, home: Path) -> Attempt:
    """The course without any disturbance."""
    whole = Attempt(course, data, home)
    children = whole.start(nursery)
    assert [child.finish() for child in children] == [0] * course.world_size, children[0].output
    whole.assert_nothing_leaks(children)
    assert all(len(keys) == 1 for keys in samples_noted(whole.samples_file(0)).values())
    return whole
