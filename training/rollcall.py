"""The roll call before the process group: who was expected, who came, from where, with which versions.

A missing or doubled rank makes NCCL and gloo wait for minutes and then say little. Here every rank writes
one line into the TCP store, rank 0 reads them within a short limit and answers all with one verdict.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from models.errors import ConfigError
from training.config import ClusterConfig
from training.launch import Launch


def open_store(launch: Launch, cluster: ClusterConfig) -> dist.Store:
    """The key-value store of all ranks. Raises ConfigError when rank 0 cannot be reached in time."""
    host, port = _address(launch, cluster)
    # Under torchrun the agent already serves the store, and every restart gets its own key space.
    agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store: dist.Store = dist.TCPStore(
            host,
            port,
            launch.size,
            is_master=launch.rank == 0 and not agent_serves,
            timeout=timedelta(seconds=cluster.rendezvous_timeout_s),
            wait_for_workers=False,
        )
    except (dist.DistError, RuntimeError, TimeoutError) as exc:
        raise ConfigError(
            f"rank {launch.rank} on {socket.gethostname()} cannot meet rank 0 at {host}:{port} ({_first_line(exc)}); "
            "export MASTER_ADDR and MASTER_PORT, or check that rank 0 runs and the port is open"
        ) from exc
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _address(launch: Launch, cluster: ClusterConfig) -> tuple[str, int]:
    if cluster.dist_url:
        host, _, port = cluster.dist_url.removeprefix("tcp://").rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"--dist-url {cluster.dist_url!r} is not of the form tcp://host:port")
        return host, int(port)
    return _reachable(launch.host), launch.port


def _reachable(host: str) -> str:
    """`host`, or the address of the node that launched the step where the node's name resolves to nothing."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except socket.gaierror:
        return os.environ.get("SLURM_LAUNCH_NODE_IPADDR", host)


def call_roll(store: dist.Store, launch: Launch, timeout_s: float) -> None:
    """Every rank reports; all return together, or all raise the same ConfigError."""
    answer = f"answer/{launch.rank}"
    if store.add(f"present/{launch.rank}", 1) > 1:
        store.set("doubled", str(launch.rank))
    store.set(answer, json.dumps(_card(launch)))
    if launch.rank == 0:
        store.set("verdict", _verdict(store, launch, timeout_s))
    try:
        store.wait(["verdict"], timedelta(seconds=timeout_s + 10))
        verdict = store.get("verdict").decode()
    except (dist.DistError, RuntimeError, TimeoutError) as exc:
        raise ConfigError(f"rank {launch.rank}: no word from rank 0 within {timeout_s:.0f} s") from exc
    if verdict:
        raise ConfigError(verdict)


def _card(launch: Launch) -> dict[str, Any]:
    return {
        "rank": launch.rank,
        "size": launch.size,
        "host": socket.gethostname(),
        "local_rank": launch.local_rank,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _verdict(store: dist.Store, launch: Launch, timeout_s: float) -> str:
    """An empty string when all is well, otherwise what is wrong and the likely cause."""
    deadline = time.monotonic() + timeout_s
    missing = list(range(launch.size))
    while missing and time.monotonic() < deadline:
        missing = [rank for rank in missing if not store.check([f"answer/{rank}"])]
        if missing:
            time.sleep(0.05)
    if missing:
        came = launch.size - len(missing)
        return (
            f"{came} of {launch.size} ranks came within {timeout_s:.0f} s; missing: {_some(missing)}. "
            "Likely: fewer tasks were started than the world size says (ntasks-per-node, --nproc-per-node), or a node "
            "cannot reach rank 0"
        )
    cards = [json.loads(store.get(f"answer/{rank}")) for rank in range(launch.size)]
    if store.check(["doubled"]):
        return f"rank {store.get('doubled').decode()} was started twice: two jobs share MASTER_ADDR and MASTER_PORT"
    for what in ("torch", "python", "size"):
        if len({card[what] for card in cards}) > 1:
            return f"ranks differ in {what}: " + ", ".join(_groups(cards, what))
    return ""


def _groups(cards: list[dict[str, Any]], what: str) -> list[str]:
    by_value: dict[Any, list[int]] = {}
    for card in cards:
        by_value.setdefault(card[what], []).append(card["rank"])
    return [f"{value} on ranks {_some(ranks)}" for value, ranks in by_value.items()]


def _some(ranks: list[int], limit: int = 16) -> str:
    tail = f" and {len(ranks) - limit} more" if len(ranks) > limit else ""
    return ", ".join(map(str, ranks[:limit])) + tail


def _first_line(exc: BaseException) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0]
