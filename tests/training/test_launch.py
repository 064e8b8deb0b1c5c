"""Ranks and addresses from the environment of torchrun, of Slurm and of nobody."""

from __future__ import annotations

import pytest

from models.errors import ConfigError
from training.launch import expand_hosts, job_port, read_launch

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_JOB_NODELIST": "a[07-08]",
}


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("node1", ["node1"]),
        ("n[1-3,7]", ["n1", "n2", "n3", "n7"]),
        ("a01,b[02-04]", ["a01", "b02", "b03", "b04"]),
        ("r[1-2]n[09-10]-ib", ["r1n09-ib", "r1n10-ib", "r2n09-ib", "r2n10-ib"]),
        ("gpu-[001,003]", ["gpu-001", "gpu-003"]),
        ("", []),
    ],
)
def test_node_lists_in_all_bracket_forms_are_expanded(nodelist: str, hosts: list[str]) -> None:
    assert list(expand_hosts(nodelist)) == hosts


def test_without_a_launcher_there_is_one_rank() -> None:
    assert (read_launch({}).rank, read_launch({}).size) == (0, 1)


def test_slurm_gives_ranks_and_the_first_node_as_address() -> None:
    launch = read_launch(SLURM)
    assert (launch.rank, launch.size, launch.local_rank, launch.local_size) == (9, 16, 1, 8)
    assert launch.host == "a07"
    assert 12_000 <= launch.port < 28_000


def test_what_the_user_exported_is_not_overridden() -> None:
    launch = read_launch(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert (launch.host, launch.port) == ("10.0.0.1", 29500)


def test_torchrun_inside_a_slurm_job_wins() -> None:
    env = SLURM | {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    assert (read_launch(env).rank, read_launch(env).size) == (3, 4)


def test_a_slurm_job_without_srun_is_refused_with_the_cure() -> None:
    env = {key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"}
    with pytest.raises(ConfigError, match="put 'srun' before"):
        read_launch(env)


def test_two_jobs_and_a_requeue_get_different_ports() -> None:
    ports = {
        job_port({"SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": restart})
        for job in ("1", "2")
        for restart in ("0", "1")
    }
    assert len(ports) == 4
