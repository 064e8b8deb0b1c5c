"""Runs a function on several gloo ranks with a time limit. Knows processes and pipes, not models or data.

Ranks are forked from a server that has imported torch once, so that a rank starts in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import secrets
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

FIRST_PORT, NUM_PORTS = 16384, 16384  # below what systems give to connections
GRACE_S = 5.0  # what the other ranks get after the first failure: theirs is often the more telling message


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on at the moment, and that no other worker of pytest is given.

    Seconds may pass until a program listens there. The system gives its own choice, ports above these, to others.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = FIRST_PORT + secrets.randbelow(NUM_PORTS // workers) * workers + worker
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0, env: dict[str, str] | None = None
) -> list[Any]:
    """Calls `fn(*args)` on each of `world_size` processes and returns the results by rank.

    Each process has torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT); `fn` joins a process group itself, by `training.distributed.session` or by `gloo_group`.
    `fn` is a module's top-level function; arguments and results travel by value.
    Raises AssertionError with every failed rank's traceback, or each rank's stacks at the time limit.
    """
    port = free_port()
    payload = pickle.dumps((fn, args))
    with tempfile.TemporaryDirectory(prefix="clipyard-ranks-") as folder:
        ranks = [
            _start(rank, payload, _environment(rank, world_size, port, env), Path(folder) / f"rank{rank}.log")
            for rank in range(world_size)
        ]
        try:
            _collect(ranks, timeout_s)
            return [_result(rank, ranks, timeout_s) for rank in ranks]
        finally:
            for rank in ranks:
                rank.process.kill()
                rank.process.join()


@contextlib.contextmanager
def gloo_group() -> Iterator[tuple[int, int]]:
    """Joins the default process group from the environment of `run_ranks`; yields (rank, world size)."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


@dataclass
class _Rank:
    index: int
    process: Any
    pipe: Connection
    log: Path
    outcome: tuple[str, Any] | None = None

    def receive(self) -> None:
        try:
            self.outcome = pickle.loads(self.pipe.recv_bytes())
        except EOFError:
            self.process.join()
            self.outcome = ("error", f"died with exit code {self.process.exitcode}\n{_tail(self.log)}")


def _environment(rank: int, world_size: int, port: int, extra: dict[str, str] | None) -> dict[str, str]:
    launch = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return dict(os.environ) | launch | (extra or {})


def _start(index: int, payload: bytes, env: dict[str, str], log: Path) -> _Rank:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])
    ours, theirs = context.Pipe(duplex=False)
    # Not daemonic: a rank may have loader workers of its own.
    process = context.Process(target=_body, args=(payload, env, str(log), theirs), name=f"rank{index}")
    process.start()
    theirs.close()
    return _Rank(index, process, ours, log)


def _body(payload: bytes, env: dict[str, str], log: str, pipe: Connection) -> None:
    os.environ.clear()
    os.environ.update(env)
    # The fork server may have been started by a loader, with the signals of a job's end blocked.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
    with open(log, "w", buffering=1) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        faulthandler.register(signal.SIGUSR1, file=stream, all_threads=True)
        try:
            fn, args = pickle.loads(payload)
            reply = pickle.dumps(("ok", fn(*args)))
        except BaseException:
            reply = pickle.dumps(("error", traceback.format_exc()))
        pipe.send_bytes(reply)
        pipe.close()
        sys.stdout.flush()


def _collect(ranks: list[_Rank], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while waiting := {rank.pipe: rank for rank in ranks if rank.outcome is None}:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            return
        for pipe in ready:
            rank = waiting[pipe]  # type: ignore[index]
            rank.receive()
            if rank.outcome and rank.outcome[0] == "error":
                deadline = min(deadline, time.monotonic() + GRACE_S)


def _result(rank: _Rank, ranks: list[_Rank], timeout_s: float) -> Any:
    if any(other.outcome is None or other.outcome[0] == "error" for other in ranks):
        raise AssertionError("\n".join(_describe(other, timeout_s) for other in ranks))
    assert rank.outcome is not None
    return rank.outcome[1]


def _describe(rank: _Rank, timeout_s: float) -> str:
    if rank.outcome is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.process.pid, signal.SIGUSR1)
            _wait_for_stacks(rank.log)
        return f"--- rank {rank.index}: no result (limit {timeout_s:g} s)\n{_tail(rank.log)}"
    kind, value = rank.outcome
    return f"--- rank {rank.index}: {value if kind == 'error' else 'finished'}"


def _wait_for_stacks(log: Path, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while "most recent call first" not in _tail(log) and time.monotonic() < deadline:
        time.sleep(0.05)


def _tail(log: Path, chars: int = 4000) -> str:
    return log.read_text(errors="replace")[-chars:] if log.exists() else ""
