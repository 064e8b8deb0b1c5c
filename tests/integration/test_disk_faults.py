"""What becomes of a run whose disk fails it: two ranks, a file system of their own, exit code 1 and a whole checkpoint.

File systems are mounted, which needs root and the right to mount; elsewhere the tests skip and say so.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.process import Running, start_ranks
from tests.helpers.shards import write_shards
from tests.integration.test_training import TINY
from training.checkpoint_files import find_latest

Disk = Callable[[str], Path]
LIMIT_S = 60.0  # in which all ranks are down


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three shards of 16 samples: 3 steps an epoch for two ranks."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [16, 16, 16])
    return f"{folder}/shard-{{00000..00002}}.tar"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """`disk("200m")`: a folder with a file system of that size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: str) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def two_ranks(logs: Path, data: str, *flags: str) -> contextlib.AbstractContextManager[list[Running]]:
    """A run of two ranks that would take long; a checkpoint at every tenth step."""
    command = [*TINY, "--train-data", data, "--logs", str(logs), "--name", "run", "--epochs", "1000"]
    command += ["--save-frequency", "1000", "--save-every-n-steps", "10", *flags]
    return start_ranks(2, *command)


def assert_clear_end(ranks: list[Running], message: str) -> None:
    """Both ranks end in time with 1; rank 0 has `message` in its last line, and nobody a traceback."""
    ended = [rank.finish(LIMIT_S).expect(1).output for rank in ranks]
    assert message in ended[0].strip().splitlines()[-1]
    assert "Traceback" not in "".join(ended), "\n".join(ended)


def assert_last_is_whole(logs: Path) -> None:
    """The newest checkpoint verifies."""
    latest, passed_over = find_latest(logs / "run" / "checkpoints")
    assert latest is not None and passed_over == []


@pytest.mark.slow
def test_a_disk_that_checkpoints_fill_ends_the_run_with_the_last_one_whole(disk: Disk, data: str) -> None:
    logs = disk("100m")
    with two_ranks(logs, data, "--keep-last", "9") as ranks:
        assert_clear_end(ranks, "No space left on device")
        assert "earlier checkpoints are untouched" in ranks[0].output
    assert_last_is_whole(logs)


@pytest.mark.slow
def test_a_disk_that_others_fill_ends_the_run_without_a_traceback(disk: Disk, data: str) -> None:
    logs = disk("400m")
    with two_ranks(logs, data, "--report-to", "all") as ranks:
        ranks[0].wait_for(r"^saved .*step_000000020")
        subprocess.run(["dd", "if=/dev/zero", f"of={logs}/filler", "bs=64k"], capture_output=True)
        assert_clear_end(ranks, "No space left on device")
    assert_last_is_whole(logs)


@pytest.mark.slow
def test_a_run_folder_that_becomes_read_only_is_named_and_the_checkpoint_stays(disk: Disk, data: str) -> None:
    logs = disk("400m")
    with two_ranks(logs, data, "--stop-after-steps", "16") as ranks:
        for rank in ranks:
            rank.finish(LIMIT_S).expect(75)
    subprocess.run(["mount", "-o", "remount,ro", str(logs)], check=True)
    with two_ranks(logs, data, "--resume", "latest") as ranks:
        assert_clear_end(ranks, "run cannot be written: Read-only file system")
    latest, _ = find_latest(logs / "run" / "checkpoints")
    assert latest is not None and latest.name == "step_000000016"


@pytest.mark.slow
def test_a_run_folder_that_is_unmounted_ends_the_run_instead_of_going_on_beneath(disk: Disk, data: str) -> None:
    logs = disk("400m")
    with two_ranks(logs, data) as ranks:
        ranks[0].wait_for(r"^saved .*step_000000010")
        subprocess.run(["umount", "-l", str(logs)], check=True)
        assert_clear_end(ranks, "No such file or directory")
