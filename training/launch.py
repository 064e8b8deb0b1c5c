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


def read_launch(env: Mapping[str, str]) -> Launch:
    """Read the launcher's environment. Raises ConfigError when it is contradictory."""
    if "RANK" in env and "WORLD_SIZE" in env:
        return _from_torchrun(env)
    if "SLURM_JOB_ID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        return _from_slurm(env)
    return Launch(0, 1, 0, 1, "127.0.0.1", 0, "single process")


def _from_torchrun(env: Mapping[str, str]) -> Launch:
    rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
    if size > 1 and not ("MASTER_ADDR" in env and "MASTER_PORT" in env):
        raise ConfigError("RANK and WORLD_SIZE are set but MASTER_ADDR and MASTER_PORT are not: use torchrun or srun")
    return Launch(
        rank,
        size,
        int(env.get("LOCAL_RANK", rank)),
        int(env.get("LOCAL_WORLD_SIZE", size)),
        env.get("MASTER_ADDR", "127.0.0.1"),
        int(env.get("MASTER_PORT", 0)),
        "torchrun" if "TORCHELASTIC_RUN_ID" in env else "environment",
    )


def _from_slurm(env: Mapping[str, str]) -> Launch:
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env:
        raise ConfigError(
            f"this job has {env['SLURM_NTASKS']} tasks, but the program was not started by srun: "
            "put 'srun' before 'python -m training.main' (or use torchrun)"
        )
    nodes = list(expand_hosts(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")))
    return Launch(
        int(env["SLURM_PROCID"]),
        int(env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"]),
        int(env.get("SLURM_LOCALID", 0)),
        _tasks_on_node(env),
        env.get("MASTER_ADDR") or (nodes[0] if nodes else "127.0.0.1"),
        int(env.get("MASTER_PORT") or job_port(env)),
        "srun",
    )


def _tasks_on_node(env: Mapping[str, str]) -> int:
    """This node's entry of SLURM_STEP_TASKS_PER_NODE, e.g. '8(x4),2'."""
    spec = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "1")
    counts: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", spec):
        counts += [int(count)] * int(repeat or 1)
    node = int(env.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else counts[-1]


def job_port(env: Mapping[str, str]) -> int:
    """A port that follows from job and step, so that jobs sharing a node do not meet."""
    job, step = int(env.get("SLURM_JOB_ID", 0)), int(env.get("SLURM_STEP_ID", 0))
    restart = int(env.get("SLURM_RESTART_COUNT", 0))
    return _FIRST_PORT + (job * 61 + step * 7 + restart) % _NUM_PORTS


def expand_hosts(nodelist: str) -> Iterator[str]:
    """Host names of a Slurm node list in bracket form, e.g. 'a[1-3,07],b02' (several brackets allowed)."""
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        yield from _expand_brackets(part)


def _expand_brackets(name: str) -> Iterator[str]:
    match = re.search(r"\[([^\]]*)\]", name)
    if match is None:
        yield name
        return
    head, tail = name[: match.start()], name[match.end() :]
    for item in match.group(1).split(","):
        first, _, last = item.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield from _expand_brackets(f"{head}{number:0{len(first)}d}{tail}")
