"""The fixtures that other tests stand on."""

from __future__ import annotations

import fcntl
import io
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.gloo import FIRST_PORT, free_port, gloo_group, run_ranks
from tests.helpers.process import Running, poll
from tests.helpers.s3 import S3Server
from tests.helpers.shards import caption_of, cut_tar
from tests.helpers.slurm import SlurmCluster
from tests.helpers.turnstile import turn


def _sum_of_ranks(base: int) -> tuple[int, int]:
    import torch
    import torch.distributed as dist

    with gloo_group() as (rank, _):
        value = torch.tensor(base + rank)
        dist.all_reduce(value)
        return rank, int(value)


def _fail_on_rank_one() -> None:
    with gloo_group() as (rank, _):
        if rank == 1:
            raise ValueError("rank one cannot")


def _hang_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        time.sleep(600)


def test_ranks_return_their_results_in_order() -> None:
    assert run_ranks(_sum_of_ranks, 2, 10) == [(0, 21), (1, 21)]


def test_a_failing_rank_is_named_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"rank 1: Traceback[\s\S]*ValueError: rank one cannot"):
        run_ranks(_fail_on_rank_one, 2)


def test_a_hanging_rank_is_killed_and_its_stack_shown() -> None:
    with pytest.raises(AssertionError, match=r"rank 1: no result[\s\S]*_hang_on_rank_one"):
        run_ranks(_hang_on_rank_one, 2, timeout_s=8)


def test_workers_of_pytest_are_never_given_the_same_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "3")
    for worker in range(3):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", f"gw{worker}")
        assert {(free_port() - FIRST_PORT) % 3 for _ in range(20)} == {worker}


def test_who_wants_to_be_alone_waits_for_the_others_and_is_not_overtaken(tmp_path: Path) -> None:
    order: list[str] = []

    def visit(name: str, alone: bool) -> None:
        with turn(tmp_path, alone=alone):
            order.append(f"{name} comes")
            time.sleep(0.1)
            order.append(f"{name} goes")

    visits = [
        threading.Thread(target=visit, args=("alone", True)),
        threading.Thread(target=visit, args=("late", False)),
    ]
    with turn(tmp_path, alone=False), turn(tmp_path, alone=False):
        for thread in visits:
            thread.start()
            poll(lambda: _is_locked(tmp_path / "gate.lock"), 5, "somebody in the gate")
        order.append("two go")
    for thread in visits:
        thread.join()
    assert order == ["two go", "alone comes", "alone goes", "late comes", "late goes"]


def _is_locked(path: Path) -> bool:
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def test_a_program_is_watched_and_killed_with_its_children() -> None:
    script = (
        "import subprocess, time; print('child', subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    )
    with Running([sys.executable, "-c", script]) as running:
        child = int(running.wait_for(r"child (\d+)")[1])
        assert running.kill().returncode == -9
    deadline = time.monotonic() + 5
    while _alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_shards_hold_images_and_captions_and_breakages(shards: Callable[..., list[Path]]) -> None:
    first, second = shards([3, 2], broken={1: "no_caption", 4: "empty_image"})
    with tarfile.open(first) as tar:
        assert len(tar.getnames()) == 8
        assert Image.open(io.BytesIO(tar.extractfile("00000000.jpg").read())).size == (32, 32)  # type: ignore[union-attr]
        assert tar.extractfile("00000002.txt").read().decode() == caption_of(2)  # type: ignore[union-attr]
    with tarfile.open(second) as tar:
        assert tar.getmember("00000004.jpg").size == 0
    cut_tar(second)
    with pytest.raises(tarfile.ReadError), tarfile.open(second) as tar:
        tar.extractall(first.parent / "out", filter="data")


def test_the_s3_server_answers_clients_and_the_aws_command(s3_server: S3Server) -> None:
    import fsspec

    url = s3_server.upload(b"hello", "fixtures/hello.txt")
    with fsspec.open(url, "rb") as file:
        assert file.read() == b"hello"
    assert subprocess.check_output(["aws", "s3", "cp", url, "-"], timeout=60) == b"hello"
    assert s3_server.keys("fixtures/") == ["fixtures/hello.txt"]


@pytest.mark.slow
def test_the_slurm_cluster_runs_a_task_on_each_node(slurm_cluster: SlurmCluster) -> None:
    shown = slurm_cluster.run(
        "srun", "-N2", "-n2", "sh", "-c", "echo $SLURMD_NODENAME $SLURM_PROCID $SLURM_JOB_NODELIST"
    )
    assert sorted(shown.splitlines()) == ["n0 0 n[0-1]", "n1 1 n[0-1]"]


@pytest.mark.slow
def test_a_slurm_job_that_ends_with_75_can_be_requeued(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sbatch"
    script.write_text(
        "#!/bin/bash\n#SBATCH -N2 -n2 --requeue --open-mode=append\n"
        "srun sh -c 'echo start $SLURM_RESTART_COUNT; [ -n \"$SLURM_RESTART_COUNT\" ] || exit 75'\n"
        "code=$?; [ $code = 75 ] && scontrol requeue $SLURM_JOB_ID; exit $code\n"
    )
    job_id = slurm_cluster.submit(script, f"--output={tmp_path}/out.txt")
    job = slurm_cluster.wait_end(job_id, timeout_s=90)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    assert (tmp_path / "out.txt").read_text().count("start 1") == 2
