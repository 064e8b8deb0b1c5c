"""Ranks and addresses from the environment of torchrun, of Slurm and of nobody."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import ConfigError
from training.launch import expand_hosts, job_ports, read_launch, restarts_in_vain

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
        ("a01-b[02-04]", ["a01-b02", "a01-b03", "a01-b04"]),
        ("rack[1-2]n[01-03]", ["rack1n01", "rack1n02", "rack1n03", "rack2n01", "rack2n02", "rack2n03"]),
        ("a,b[1-2],c", ["a", "b1", "b2", "c"]),
        ("n[1-2]i", ["n1i", "n2i"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[098-101,7]", ["n098", "n099", "n100", "n101", "n7"]),
        ("", []),
    ],
)
def test_node_lists_in_all_bracket_forms_are_expanded(nodelist: str, hosts: list[str]) -> None:
    assert list(expand_hosts(nodelist)) == hosts


_RANGES = st.tuples(st.integers(1, 4), st.integers(0, 120), st.integers(1, 12))  # digits, first, how many
_PARTS = st.tuples(
    st.sampled_from(["n", "a01-b", "rack-", "gpu"]),
    st.lists(_RANGES, max_size=3),
    st.sampled_from(["", "i", "-ib", ".site"]),
)


@given(st.lists(_PARTS, min_size=1, max_size=4))
@settings(deadline=None)
def test_a_node_list_names_each_host_once_and_in_order(
    parts: list[tuple[str, list[tuple[int, int, int]], str]],
) -> None:
    written, hosts = [], []
    for head, ranges, tail in parts:
        numbers = [[str(first + i).zfill(digits) for i in range(count)] for digits, first, count in ranges]
        items = [run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in numbers]
        written.append(f"{head}[{','.join(items)}]{tail}" if items else f"{head}{tail}")
        hosts += [f"{head}{number}{tail}" for run in numbers for number in run] if items else [f"{head}{tail}"]
    assert list(expand_hosts(",".join(written))) == hosts


@pytest.mark.parametrize("nodelist", ["n[1-3", "n1-3]", "n[1-]", "n[a-c]", "n[]"])
def test_a_node_list_that_cannot_be_read_is_named(nodelist: str) -> None:
    with pytest.raises(ConfigError, match=r"the node list .* cannot be read"):
        list(expand_hosts(nodelist))


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


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({}, "this job has 16 tasks"),
        ({"SLURM_NTASKS": "", "SLURM_JOB_NUM_NODES": "2"}, "this job has 2 nodes"),
        ({"SLURM_STEP_ID": "4294967291", "SLURM_STEP_NUM_TASKS": "1"}, "this job has 16 tasks"),  # the batch step
        ({"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, "this job has 16 tasks"),  # salloc's shell
    ],
)
def test_a_slurm_job_without_srun_is_refused_with_the_cure(change: dict[str, str], what: str) -> None:
    env = {key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"} | change
    with pytest.raises(ConfigError, match=f"{what}.*put 'srun' before.*for one process alone export RANK=0"):
        read_launch(env)
    assert read_launch(env | {"RANK": "0", "WORLD_SIZE": "1"}).size == 1


def test_a_single_task_of_a_larger_job_is_one_rank() -> None:
    step = {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_NUM_NODES": "2"}
    assert read_launch(SLURM | step).size == 1


def test_tasks_that_each_believe_to_be_alone_are_refused() -> None:
    env = SLURM | {"SLURM_STEP_NUM_TASKS": "16", "RANK": "0", "WORLD_SIZE": "1"}
    with pytest.raises(ConfigError, match=r"srun started 16 tasks, but WORLD_SIZE=1 is exported.*unset RANK"):
        read_launch(env)


TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "3",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "1",
    "TORCHELASTIC_RUN_ID": "none",
    "GROUP_WORLD_SIZE": "1",
}


def test_several_torchruns_on_a_node_are_refused() -> None:
    env = SLURM | TORCHRUN | {"SLURM_STEP_NUM_TASKS": "16"}
    with pytest.raises(ConfigError, match=r"srun started 8 torchruns on this node.*--ntasks-per-node 1"):
        read_launch(env)


def test_torchruns_that_did_not_meet_are_a_warning_because_a_node_may_be_lost() -> None:
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    launch = read_launch(SLURM | TORCHRUN | step)
    assert launch.warning.startswith("srun started 2 torchruns, and 1 of them met.")
    assert not read_launch(SLURM | TORCHRUN | step | {"GROUP_WORLD_SIZE": "2"}).warning


def test_restarts_that_would_not_go_on_are_a_warning() -> None:
    assert "--max-restarts 2" in restarts_in_vain({"TORCHELASTIC_MAX_RESTARTS": "2"}, None)
    assert not restarts_in_vain({"TORCHELASTIC_MAX_RESTARTS": "2"}, "latest")
    assert not restarts_in_vain({"TORCHELASTIC_MAX_RESTARTS": "0"}, None)
    assert not restarts_in_vain({}, None)


@pytest.mark.parametrize(("name", "value"), [("RANK", "first"), ("RANK", "4"), ("MASTER_PORT", "auto")])
def test_an_environment_that_makes_no_sense_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.?{value}"):
        read_launch(TORCHRUN | {name: value})


def test_jobs_and_requeues_get_different_ports_outside_the_ephemeral_range() -> None:
    ports = [
        port
        for job in ("1", "2")
        for restart in ("0", "1")
        for port in job_ports({"SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": restart})
    ]
    assert len(ports) == len(set(ports)) == 16
    assert all(12_000 <= port < 28_000 for port in ports)


def test_all_tasks_of_a_job_derive_the_same_ports() -> None:
    first, last = read_launch(SLURM | {"SLURM_PROCID": "0"}), read_launch(SLURM | {"SLURM_PROCID": "15"})
    assert (first.port, first.spare_ports, first.job) == (last.port, last.spare_ports, last.job)
    assert first.spare_ports and not read_launch(SLURM | {"MASTER_PORT": "29500"}).spare_ports
