"""Starts whole training processes in tenths of a second. Knows how a process is born, not what it trains.

A server has imported all that a run imports, once, and stays without threads and handlers; for each run it forks a
child with a session, an environment, a terminal and signals of its own, which then is the program: it calls
`training.main.main` and ends as the interpreter ends.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing.process
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.helpers.process import ROOT, environment

QUIET = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # No threads to lose in a fork.
MODULES = ("torch", "torchvision", "safetensors.torch", "simplejpeg", "training.run", "torch.utils.data")


@dataclass(frozen=True)
class Order:
    """A program to be run. `prepare`: functions with their arguments, called in the child before it."""

    argv: tuple[str, ...]
    log: str
    env: dict[str, str] = field(default_factory=dict)
    prepare: tuple[tuple[Callable[..., None], tuple[Any, ...]], ...] = ()


class Nursery:
    """The client's end; a context manager. On leaving, all that was started is killed."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="clipyard-nursery-")
        self._num_folders = 0
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "tests.helpers.nursery", str(theirs.fileno())]
        self._server = subprocess.Popen(command, cwd=ROOT, env=environment(QUIET), pass_fds=[theirs.fileno()])
        theirs.close()
        self._connection: Connection = Connection(ours.detach())
        self._ended: dict[int, int] = {}
        self._alive: dict[int, Child] = {}

    def new_folder(self) -> Path:
        """For what runs keep in TMPDIR; its path is as short as those of sockets must be."""
        self._num_folders += 1
        folder = Path(self._folder.name) / str(self._num_folders)
        folder.mkdir()
        return folder

    def start(self, order: Order) -> Child:
        """A child that has just been forked."""
        Path(order.log).touch()
        self._connection.send(order)
        child = Child(self, self._receive_until(lambda message: message[0] == "started")[1], Path(order.log))
        self._ended.pop(child.pid, None)  # an earlier process of that number
        self._alive[child.pid] = child
        return child

    def exit_code(self, pid: int, timeout_s: float) -> int | None:
        """The child's exit code, negative for a signal; None when it still runs after `timeout_s`."""
        self._receive_until(lambda _: pid in self._ended, timeout_s)
        return self._ended.get(pid)

    def _receive_until(self, enough: Callable[[Any], bool], timeout_s: float = 120.0) -> Any:
        deadline, message = time.monotonic() + timeout_s, (None, None)
        while not enough(message):
            if not self._connection.poll(max(0.0, deadline - time.monotonic())):
                return None, None
            message = self._connection.recv()
            if message[0] == "ended":
                self._ended[message[1]] = message[2]
                self._alive.pop(message[1])
        return message

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for child in list(self._alive.values()):
            child.kill()
        self._connection.close()
        self._server.wait(30)
        self._folder.cleanup()


class Child:
    """A run under way, in a session of its own."""

    def __init__(self, nursery: Nursery, pid: int, log: Path):
        self._nursery, self.pid, self.log = nursery, pid, log

    @property
    def output(self) -> str:
        """stdout and stderr so far."""
        return self.log.read_text(errors="replace")

    def signal(self, number: int, *, group: bool = False) -> None:
        """Sends a signal to the program, or to it and the processes of its group; nothing where it has ended."""
        with contextlib.suppress(ProcessLookupError):
            try:
                (os.killpg if group else os.kill)(self.pid, number)
            except ProcessLookupError:
                os.kill(self.pid, number)  # so young that it has no group yet

    def kill(self) -> int:
        """SIGKILL to the whole process group; returns when the program is gone."""
        self.signal(signal.SIGKILL, group=True)
        return self.finish(30)

    def finish(self, timeout_s: float = 120.0) -> int:
        """The exit code, negative for a signal. AssertionError with the output at the time limit."""
        code = self._nursery.exit_code(self.pid, timeout_s)
        if code is None:
            self.signal(signal.SIGKILL, group=True)
        assert code is not None, f"process {self.pid} still runs after {timeout_s:g} s:\n{self.output}"
        return code

    def session(self) -> list[Path]:
        """Those processes of this child's session that are still there, as their folders in /proc."""
        return [path for path in Path("/proc").iterdir() if path.name.isdigit() and _is_member(path, self.pid)]


def _is_member(process: Path, session: int) -> bool:
    try:
        state, _, _, its_session = re.sub(r".*\) ", "", (process / "stat").read_text(), flags=re.DOTALL).split()[:4]
    except OSError:
        return False  # It ended while it was looked at.
    return int(its_session) == session and state != "Z"


# ---- the server


def serve(connection: Connection) -> Order | None:
    """Forks until the client goes: then None. In a child, the order that it is to carry out."""
    children: dict[int, int] = {}
    while True:
        for ready in wait([connection, *children]):
            if ready is not connection:
                _report_end(connection, children, ready)
                continue
            try:
                order = connection.recv()
            except EOFError:
                return None
            assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose these threads"
            pid = os.fork()
            if pid == 0:
                connection.close()
                for descriptor in children:
                    os.close(descriptor)
                return order
            children[os.pidfd_open(pid)] = pid
            connection.send(("started", pid))


def _report_end(connection: Connection, children: dict[int, int], pidfd: Any) -> None:
    pid = children.pop(pidfd)
    os.close(pidfd)
    connection.send(("ended", pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))


def become(order: Order) -> int:
    """Carries out `order` in this process, as a program that was started for it; the exit code."""
    os.setsid()
    with open(os.devnull) as nothing, open(order.log, "a", buffering=1) as log:
        for stream, descriptor in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(stream.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(order.env)
    tempfile.tempdir = None
    # Names in /dev/shm that can be told from those of others.
    multiprocessing.process.current_process()._config["semprefix"] = f"/{shm_prefix(os.getpid())}"  # type: ignore[attr-defined]
    _fork_loader_servers()
    for function, arguments in order.prepare:
        function(*arguments)
    from training.main import main
    from training.preemption import hold_signals

    hold_signals()  # as the program does
    return main(order.argv)


def shm_prefix(pid: int) -> str:
    """How the names of a child's semaphores begin."""
    return f"mp-nursery-{pid}"


def _fork_loader_servers() -> None:
    """The loader's fork server is forked from here: started anew it would import torch for seconds."""
    from multiprocessing import util

    spawn = util.spawnv_passfds

    def forked(path: Any, args: Sequence[Any], passed: Sequence[int]) -> int:
        command = str(args[-1])
        if not command.startswith("from multiprocessing.forkserver"):
            return spawn(path, args, passed)
        pid = os.fork()
        if pid == 0:
            try:
                _forget_descriptors({0, 1, 2, *passed})
                exec(command, {})
            finally:
                os._exit(0)
        return pid

    util.spawnv_passfds = forked  # type: ignore[assignment]


def _forget_descriptors(kept: set[int]) -> None:
    """Every other descriptor leads to nothing: closed, its number could be taken, and closed again by its old owner."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in {nothing, *kept}:
            os.dup2(nothing, int(name), inheritable=False)


def ranks(world_size: int, port: int) -> list[dict[str, str]]:
    """The launch environment of each rank, as torchrun would set it; empty for a single process."""
    if world_size == 1:
        return [{}]
    shared = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def main(descriptor: int) -> int:
    """The server's program; returns an exit code in the server and in each of its children."""
    for module in MODULES:
        importlib.import_module(module)
    order = serve(Connection(descriptor))
    return 0 if order is None else become(order)


if __name__ == "__main__":
    # By its own name, so that what the client pickled is found under it.
    from tests.helpers import nursery

    sys.exit(nursery.main(int(sys.argv[1])))
