"""Runs on a real two-node Slurm on this machine: submitted, preempted, killed, cancelled (skipped without Slurm)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.process import ROOT, environment, poll
from tests.helpers.shards import write_shards
from tests.helpers.slurm import SlurmCluster
from training.submission.snapshot import snapshot, survey

pytestmark = pytest.mark.slow

# What a small CPU cluster needs instead of the templates' 8 GPUs a node.
SMALL_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gres=none", "--cpus-per-task=1", "--time=30")
STEPS = 200
SMALL_RUN = (
    *("--model=tiny-test", "--device=cpu", "--precision=fp32", "--no-torchcompile"),
    *("--batch-size=4", "--epochs=1", "--warmup=2", "--lr=1e-4", "--workers=1", "--log-every-n-steps=1"),
    *("--no-ddp-static-graph", "--no-grad-checkpointing", f"--train-num-samples={8 * STEPS}"),
)


@dataclass(frozen=True)
class Runs:
    """A user's data and folder of runs, and the cluster."""

    cluster: SlurmCluster
    folder: Path
    data: str

    @property
    def env(self) -> dict[str, str]:
        """What the user's shell exports."""
        own = {"TRAIN_DATA": self.data, "CLIPYARD_VENV": sys.prefix}
        return environment() | self.cluster.env | own

    def sbatch(self, template: str, name: str) -> str:
        """Submits a template as it is, from the checkout; the job's id."""
        options = (*SMALL_NODES, f"--chdir={ROOT}", f"--output={self.folder}/{name}.out")
        env = self.env | {"NAME": name, "LOGS": str(self.folder), "TRAIN_NUM_SAMPLES": "1"}
        return self.cluster.run(
            "sbatch", "--parsable", *options, ROOT / "slurm" / template, *SMALL_RUN, env=env
        ).strip()

    def submit(self, name: str, *flags: str, options: tuple[str, ...] = (), checkout: Path = ROOT) -> list[str]:
        """`python -m scripts.submit` in `checkout`; the jobs' ids."""
        nodes = [f"--sbatch-arg={option}" for option in SMALL_NODES]
        command = [sys.executable, "-m", "scripts.submit", "8xh100", "--name", name, "--logs", str(self.folder)]
        done = subprocess.run(
            [*command, *nodes, *options, "--", *SMALL_RUN, *flags],
            cwd=checkout,
            env=self.env | {"PYTHONPATH": str(checkout)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        (jobs,) = re.findall(r"^submitted: job (.+)$", done.stdout, re.MULTILINE)
        return str(jobs).split()

    def losses(self, name: str) -> list[tuple[int, float]]:
        """(step, loss) of every training line in metrics.jsonl, in the file's order."""
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("}")]
        return [(record["step"], record["train/loss"]) for record in records if "train/loss" in record]

    def output(self, name: str) -> str:
        """What the jobs of the run wrote."""
        logs = [self.folder / f"{name}.out", *sorted((self.folder / name).glob("slurm-*.out"))]
        return "\n".join(log.read_text(errors="replace") for log in logs if log.exists())

    def wait_for_step(self, name: str, job_id: str, step: int) -> None:
        """Until the run has trained so far."""

        def probe() -> bool:
            state = self.cluster.job(job_id)["JobState"]
            assert state in ("PENDING", "CONFIGURING", "RUNNING"), f"{state}: {self.output(name)}"
            return len(self.losses(name)) >= step

        poll(probe, 120, f"step {step}")

    def wait_completed(self, name: str, job_id: str) -> dict[str, str]:
        """Until the job has ended well."""
        job = self.cluster.wait_end(job_id)
        assert job["JobState"] == "COMPLETED", f"{job}\n{self.output(name)}\n{self.cluster.logs()}"
        return job


@pytest.fixture(scope="module")
def runs(slurm_cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Four small shards, and an empty folder of runs."""
    folder = tmp_path_factory.mktemp("runs")
    shards = write_shards(folder / "shards", [16, 16, 16, 16])
    return Runs(slurm_cluster, folder / "logs", f"{shards[0].parent}/shard-{{00000..00003}}.tar")


@pytest.fixture(scope="module")
def uninterrupted(runs: Runs) -> list[tuple[int, float]]:
    """The losses of the run that nobody disturbs, by a template as it is."""
    runs.folder.mkdir()
    runs.wait_completed("reference", runs.sbatch("train_8xh100.sbatch", "reference"))
    return runs.losses("reference")


def _rank_of(job_id: str, rank: int) -> int:
    """The process of one rank of a job."""
    wanted = {f"SLURM_JOB_ID={job_id}".encode(), f"SLURM_PROCID={rank}".encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            program = (folder / "cmdline").read_bytes().split(b"\0")
            if b"training.main" in program and wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                return int(folder.name)
    raise AssertionError(f"no rank {rank} of job {job_id}")


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    """A checkout of its own, to be deleted while jobs run."""
    folder, _ = snapshot(survey(ROOT, without=tmp_path), tmp_path)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_a_template_trains_on_two_nodes(runs: Runs, uninterrupted: list[tuple[int, float]]) -> None:
    assert [step for step, _ in uninterrupted] == list(range(1, STEPS + 1))
    assert (runs.folder / "reference" / "checkpoints" / "epoch_1" / "manifest.json").exists()


def test_a_preempted_run_goes_on_with_the_code_that_was_submitted(
    runs: Runs, checkout: Path, uninterrupted: list[tuple[int, float]]
) -> None:
    (job_id,) = runs.submit("preempted", checkout=checkout)
    shutil.rmtree(checkout)
    runs.wait_for_step("preempted", job_id, 3)
    runs.cluster.run("scancel", "--signal=USR2", job_id)
    job = runs.wait_completed("preempted", job_id)
    assert job["Restarts"] == "1"
    assert "preempted and saved, with a new checkpoint: requeue of job" in runs.output("preempted")
    assert runs.losses("preempted") == uninterrupted
    (submitted,) = (runs.folder / "preempted").glob("submissions/*/config.yaml")
    assert submitted.read_text() == (runs.folder / "preempted" / "config.yaml").read_text()


def test_a_run_whose_rank_was_killed_is_tried_again(runs: Runs, uninterrupted: list[tuple[int, float]]) -> None:
    (job_id,) = runs.submit("killed", "--save-every-n-steps=20")
    runs.wait_for_step("killed", job_id, 45)
    os.kill(_rank_of(job_id, 1), signal.SIGKILL)
    job = runs.wait_completed("killed", job_id)
    assert job["Restarts"] == "1"
    assert re.search(r"exit code (137|1), with a new checkpoint: requeue of job", runs.output("killed"))
    assert re.search(r"resuming from .*step_0000000[24]0", runs.output("killed"))
    assert runs.losses("killed") == uninterrupted


def test_a_chain_goes_on_after_a_signal_and_drops_what_is_left(
    runs: Runs, uninterrupted: list[tuple[int, float]]
) -> None:
    links = runs.submit("chain", options=("--chain", "3"))
    runs.wait_for_step("chain", links[0], 3)
    runs.cluster.run("scancel", "--signal=USR2", links[0])
    states = [runs.cluster.wait_end(link)["JobState"] for link in links]
    assert states == ["FAILED", "COMPLETED", "CANCELLED"], runs.output("chain")
    assert runs.cluster.job(links[0])["ExitCode"] == "75:0"
    assert runs.losses("chain") == uninterrupted


def test_a_cancelled_run_saves_before_it_is_killed_and_stays_cancelled(runs: Runs) -> None:
    (job_id,) = runs.submit("cancelled")
    runs.wait_for_step("cancelled", job_id, 3)
    runs.cluster.run("scancel", job_id)
    assert runs.cluster.wait_end(job_id)["JobState"] == "CANCELLED"
    manifests = runs.folder / "cancelled" / "checkpoints"
    poll(lambda: list(manifests.glob("step_*/manifest.json")), 60, "a checkpoint")
    steps = [step for step, _ in runs.losses("cancelled")]
    assert [path.parent.name for path in manifests.glob("*/manifest.json")] == [f"step_{steps[-1]:09d}"]
    assert runs.cluster.job(job_id)["Restarts"] == "0"


def test_ranks_that_save_at_different_times_end_as_preempted(runs: Runs, tmp_path: Path) -> None:
    script = tmp_path / "job.sbatch"
    ranks = "sleep $((4 * SLURM_PROCID)); exit 75"
    script.write_text(f"#!/bin/bash\nNAME=late LOGS={tmp_path}\nsource slurm/env.sh\nsrun bash -c '{ranks}'\nexit $?\n")
    output = tmp_path / "out"
    options = (*SMALL_NODES, f"--chdir={ROOT}", f"--output={output}")
    job_id = runs.cluster.submit(script, *options, env=runs.env)
    assert runs.cluster.wait_end(job_id)["ExitCode"] == "75:0", output.read_text()


@pytest.mark.torture
def test_a_job_whose_ranks_hang_into_its_time_limit_is_requeued(runs: Runs, tmp_path: Path) -> None:
    script = tmp_path / "job.sbatch"
    ranks = "trap : TERM USR2; for _ in {1..200}; do sleep 6; done"
    script.write_text(
        f"#!/bin/bash\nNAME=hung LOGS={tmp_path}\nsource slurm/env.sh\nsrun bash -c '{ranks}'\nfinish $?\n"
    )
    options = (*SMALL_NODES[:-1], "--time=4", "--requeue", f"--chdir={ROOT}", f"--output={tmp_path / 'out'}")
    job_id = runs.cluster.submit(script, *options, env=runs.env)
    poll(lambda: runs.cluster.job(job_id)["Restarts"] == "1", 400, "a requeue before the time limit")
    runs.cluster.run("scancel", job_id)
    assert "exit code 137, without a new checkpoint (1 of 3): requeue" in (tmp_path / "out").read_text()
