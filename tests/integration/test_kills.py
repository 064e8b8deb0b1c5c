"""SIGKILL at random moments, over and over; at the end the run must be the one that was never killed."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.helpers.process import start_training
from tests.helpers.shards import write_shards
from tests.integration.test_training import TINY, assert_same_end, run
from training.checkpoint_files import find_latest

FLAGS = ["--save-every-n-steps", "1", "--keep-last", "2", "--resume", "latest", "--save-frequency", "1"]


def _kill_often(logs: Path, data: str, epochs: int, kills: int) -> None:
    """Starts the run and kills it, `kills` times, each time after it has had a chance of some steps and saves."""
    draw = random.Random(kills)
    command = [*TINY, "--train-data", data, "--logs", str(logs), "--name", "run", "--epochs", str(epochs), *FLAGS]
    for _ in range(kills):
        with start_training(*command) as running:
            running.wait_for(r"^(folder: |step |done|the run is complete)")
            time.sleep(draw.uniform(0, 3))
            running.kill()
        checkpoints = logs / "run" / "checkpoints"
        _, passed_over = find_latest(checkpoints) if checkpoints.is_dir() else (None, [])
        assert passed_over == []


def _check(tmp_path: Path, epochs: int, kills: int) -> None:
    write_shards(tmp_path / "shards", [16, 16, 16])
    data = f"{tmp_path}/shards/shard-{{00000..00002}}.tar"
    flags = [*FLAGS, "--epochs", str(epochs)]
    assert run(tmp_path / "whole", data, *flags) == 0
    _kill_often(tmp_path / "killed", data, epochs, kills)
    assert run(tmp_path / "killed", data, *flags) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "killed", f"epoch_{epochs}")


@pytest.mark.slow
def test_a_run_killed_a_few_times_is_bitwise_the_uninterrupted_one(tmp_path: Path) -> None:
    _check(tmp_path, epochs=12, kills=4)


@pytest.mark.torture
def test_a_run_killed_very_often_is_bitwise_the_uninterrupted_one(tmp_path: Path) -> None:
    _check(tmp_path, epochs=200, kills=int(os.environ.get("KILLS", "1000")))
