"""Slurm's commands as they are needed to submit. Knows scripts and job ids, not what is in them."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from training.errors import EXIT_FAILED, ConfigError


class QueueError(RuntimeError):
    """Slurm did not take the job. Another try may succeed."""

    exit_code = EXIT_FAILED


def sbatch(script: Path, env: Mapping[str, str]) -> str:
    """Submits the script; the job's id. Raises ConfigError without Slurm, QueueError with what Slurm says."""
    try:
        done = _run(["sbatch", "--parsable", str(script)], env)
    except FileNotFoundError:
        raise ConfigError(f"no sbatch here: submit on a node with Slurm's commands; the script is {script}") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise QueueError(f"{said} (the script is {script})")
    return done.stdout.strip().split(";")[0]


def cancel(job_id: str, env: Mapping[str, str]) -> None:
    """Takes a job out of the queue."""
    _run(["scancel", job_id], env)


def jobs_in(folder: Path, env: Mapping[str, str]) -> list[str]:
    """The user's queued and running jobs whose working directory is `folder` or below; none where Slurm is silent."""
    try:
        done = _run(["squeue", "--noheader", "--me", "--format=%i %Z"], env)
    except FileNotFoundError:
        return []
    jobs = [line.strip().partition(" ") for line in done.stdout.splitlines() if done.returncode == 0]
    return [job_id for job_id, _, place in jobs if Path(place.strip()).is_relative_to(folder)]


def _run(command: list[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=dict(env), stdin=subprocess.DEVNULL, capture_output=True, text=True)
