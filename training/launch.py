"""Who am I among the ranks: torchrun's environment, Slurm's, or a single process. Pure; touches no network.

Order: what the user or torchrun exported wins, then Slurm, then one process. Host lists are parsed here,
because containers have no `scontrol`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from models.errors import ConfigError

# Below every usual ephemeral range (Linux: from 32768), above the services of a node.
_FIRST_PORT = 12_000
_NUM_PORTS = 16_000
_SPARE_PORTS = 3  # for a job whose own port something else listens on

# From here on step ids stand for the batch script, an interactive shell and the like: srun started none of them.
_FIRST_SPECIAL_STEP = 0xFFFFFFFA


@dataclass(frozen=True)
class Launch:
    """The place of this process: ranks, and where rank 0 listens. `launcher` is for messages."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    port: int
    launcher: str
    spare_ports: tuple[int, ...] = ()  # where rank 0 listens instead if `port` is taken, in this order
    nodes: tuple[str, ...] = ()  # hosts that ranks are expected from, where they are known
    job: str = ""  # tells the ranks of this run from those of another one at the same address
    warning: str = ""  # what looks like a mistake and may be none


def read_launch(env: Mapping[str, str]) -> Launch:
    """Read the launcher's environment. Raises ConfigError when it is contradictory."""
    if "RANK" in env and "WORLD_SIZE" in env:
        return _from_torchrun(env)
    if "SLURM_JOB_ID" in env and not _started_by_srun(env):
        _refuse_without_srun(env)
    elif "SLURM_JOB_ID" in env and _number(env, "SLURM_NTASKS", 1) > 1:
        return _from_slurm(env)
    return Launch(0, 1, 0, 1, "127.0.0.1", 0, "single process")


def restarts_in_vain(env: Mapping[str, str], resume: str | None) -> str:
    """A warning when torchrun would start the ranks again and the run would not go on; empty otherwise."""
    restarts = _number(env, "TORCHELASTIC_MAX_RESTARTS", 0)
    if restarts == 0 or resume == "latest":
        return ""
    return (
        f"torchrun may start this run again (--max-restarts {restarts}), which goes on from the last checkpoint only "
        "with --name and --resume latest"
    )


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    """A whole number of the environment; what is empty counts as absent."""
    try:
        return int(env.get(name) or default)
    except ValueError:
        raise ConfigError(f"{name}={env[name]!r} in the environment is not a whole number") from None


def _started_by_srun(env: Mapping[str, str]) -> bool:
    return "SLURM_PROCID" in env and _number(env, "SLURM_STEP_ID", _FIRST_SPECIAL_STEP) < _FIRST_SPECIAL_STEP


def _refuse_without_srun(env: Mapping[str, str]) -> None:
    """One process in a job of several tasks or nodes is nearly always a forgotten srun, and leaves the rest idle."""
    tasks, nodes = _number(env, "SLURM_NTASKS", 1), _number(env, "SLURM_JOB_NUM_NODES", 1)
    if tasks > 1 or nodes > 1:
        what = f"{tasks} tasks" if tasks > 1 else f"{nodes} nodes"
        raise ConfigError(
            f"this job has {what}, but the program was not started by srun: put 'srun' before "
            "'python -m training.main' (or use torchrun); for one process alone export RANK=0 WORLD_SIZE=1"
        )


def _from_torchrun(env: Mapping[str, str]) -> Launch:
    rank, size = _number(env, "RANK", 0), _number(env, "WORLD_SIZE", 1)
    if not 0 <= rank < size:
        raise ConfigError(f"RANK={rank} does not lie between 0 and WORLD_SIZE={size} - 1")
    if size > 1 and not ("MASTER_ADDR" in env and "MASTER_PORT" in env):
        raise ConfigError("RANK and WORLD_SIZE are set but MASTER_ADDR and MASTER_PORT are not: use torchrun or srun")
    by_torchrun = "TORCHELASTIC_RUN_ID" in env
    return Launch(
        rank,
        size,
        _number(env, "LOCAL_RANK", rank),
        _number(env, "LOCAL_WORLD_SIZE", size),
        env.get("MASTER_ADDR", "127.0.0.1"),
        _number(env, "MASTER_PORT", 0),
        "torchrun" if by_torchrun else "environment",
        job=env.get("TORCHELASTIC_RUN_ID", ""),
        warning=_torchruns_in_srun(env) if by_torchrun else _ranks_in_srun(env, size),
    )


def _torchruns_in_srun(env: Mapping[str, str]) -> str:
    """A warning when srun started more torchruns than have met. Raises ConfigError where they share a node."""
    agents, started = _number(env, "GROUP_WORLD_SIZE", 1), _tasks_of_step(env)
    if agents >= started:
        return ""
    if (here := _tasks_on_node(env)) > 1:
        raise ConfigError(
            f"srun started {here} torchruns on this node, and torchrun starts the ranks of a node by itself: "
            "srun --ntasks-per-node 1 torchrun --nproc-per-node GPUS ..., or srun without torchrun"
        )
    return (
        f"srun started {started} torchruns, and {agents} of them met. If no node was lost, these are runs of their "
        "own that write into one folder: torchrun needs --nnodes, and --rdzv-endpoint (or --master-addr) of one node"
    )


def _ranks_in_srun(env: Mapping[str, str], size: int) -> str:
    if size < _tasks_of_step(env):
        raise ConfigError(
            f"srun started {_tasks_of_step(env)} tasks, but WORLD_SIZE={size} is exported, so that each of them takes "
            "itself for one of that few: unset RANK and WORLD_SIZE before srun"
        )
    return ""


def _tasks_of_step(env: Mapping[str, str]) -> int:
    return _number(env, "SLURM_STEP_NUM_TASKS", 1) if _started_by_srun(env) else 1


def _from_slurm(env: Mapping[str, str]) -> Launch:
    nodes = tuple(expand_hosts(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")))
    first, *spare = [_number(env, "MASTER_PORT", 0)] if env.get("MASTER_PORT") else job_ports(env)
    return Launch(
        _number(env, "SLURM_PROCID", 0),
        _number(env, "SLURM_STEP_NUM_TASKS", 0) or _number(env, "SLURM_NTASKS", 1),
        _number(env, "SLURM_LOCALID", 0),
        _tasks_on_node(env),
        env.get("MASTER_ADDR") or (nodes[0] if nodes else "127.0.0.1"),
        first,
        "srun",
        tuple(spare),
        nodes,
        f"{env['SLURM_JOB_ID']}.{env.get('SLURM_STEP_ID', '')}",
    )


def _tasks_on_node(env: Mapping[str, str]) -> int:
    """This node's entry of SLURM_STEP_TASKS_PER_NODE, e.g. '8(x4),2'."""
    spec = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "1")
    counts: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", spec):
        counts += [int(count)] * int(repeat or 1)
    node = _number(env, "SLURM_NODEID", 0)
    return (counts[node : node + 1] or counts[-1:] or [1])[0]


def job_ports(env: Mapping[str, str]) -> list[int]:
    """Ports that follow from job, step and restart, so that jobs sharing a node do not meet; the first is the usual."""
    job, step = _number(env, "SLURM_JOB_ID", 0), _number(env, "SLURM_STEP_ID", 0)
    first = job * 61 + step * 7 + _number(env, "SLURM_RESTART_COUNT", 0)
    # Neighbours of a job have numbers close to its own: spare ports lie far away.
    return [_FIRST_PORT + (first + 5003 * spare) % _NUM_PORTS for spare in range(1 + _SPARE_PORTS)]


def expand_hosts(nodelist: str) -> Iterator[str]:
    """Host names of a Slurm node list in bracket form, e.g. 'a[1-3,07],b02' (several brackets allowed)."""
    if nodelist.count("[") != nodelist.count("]"):
        raise ConfigError(f"the node list {nodelist!r} cannot be read: a bracket is missing")
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        yield from _expand_brackets(part)


def _expand_brackets(name: str) -> Iterator[str]:
    match = re.search(r"\[([^\]]*)\]", name)
    if match is None:
        yield name
        return
    head, tail = name[: match.start()], name[match.end() :]
    for item in match.group(1).split(","):
        if not re.fullmatch(r"\d+(-\d+)?", item):
            raise ConfigError(f"the node list {name!r} cannot be read: {item!r} is no number and no range")
        first, _, last = item.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield from _expand_brackets(f"{head}{number:0{len(first)}d}{tail}")
