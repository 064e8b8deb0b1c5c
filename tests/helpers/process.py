"""Starts our programs as a user does, with time limits and signals. Knows command lines, not what they do."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.helpers.gloo import free_port

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Finished:
    """A program that has ended: exit code (negative: killed by that signal), stdout and stderr together."""

    returncode: int
    output: str

    def expect(self, returncode: int) -> Finished:
        """Itself; raises AssertionError with the output where the exit code is another one."""
        assert self.returncode == returncode, f"exit code {self.returncode}, not {returncode}:\n{self.output}"
        return self


class Running:
    """A program under way, in a process group of its own so that its children end with it.

    A context manager: on leaving, whatever still runs is killed.
    """

    def __init__(self, command: Sequence[str], env: dict[str, str] | None = None, cwd: Path = ROOT):
        self.command = [str(part) for part in command]
        self._log = tempfile.NamedTemporaryFile(prefix="clipyard-process-", suffix=".log")  # noqa: SIM115
        self.process = subprocess.Popen(
            self.command,
            cwd=cwd,
            env=environment(env),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def output(self) -> str:
        """stdout and stderr so far."""
        return Path(self._log.name).read_text(errors="replace")

    def wait_for(self, pattern: str, timeout_s: float = 60.0) -> re.Match[str]:
        """The first match of `pattern` in the output; AssertionError at the end of the program or of the time."""
        return poll(lambda: re.search(pattern, self.output, re.MULTILINE), timeout_s, pattern, self)

    def signal(self, number: int, *, group: bool = False) -> None:
        """Sends a signal to the program, or to it and all its children."""
        if group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def finish(self, timeout_s: float = 120.0) -> Finished:
        """Waits for the end. AssertionError with the output at the time limit; children are killed in any case."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {timeout_s:g} s: {self.command}\n{self.output}") from None
        return self.kill()

    def kill(self) -> Finished:
        """SIGKILL to the whole process group, as a power cut would; waits until it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return Finished(self.process.returncode, self.output)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()
        self._log.close()


def poll(probe, timeout_s: float, what: str, running: Running | None = None):  # type: ignore[no-untyped-def]
    """The first true value of `probe()`. AssertionError when the time or the program ends before."""
    deadline = time.monotonic() + timeout_s
    while True:
        ended = running is not None and running.process.poll() is not None
        if value := probe():
            return value
        shown = running.output if running else ""
        assert not ended, f"ended without {what!r}:\n{shown}"
        assert time.monotonic() < deadline, f"no {what!r} in {timeout_s:g} s:\n{shown}"
        time.sleep(0.05)


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """This process's environment without the marks of another launch, the checkout importable, and `extra`."""
    launch = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "SLURM_",
        "TORCHELASTIC_",
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith(launch)}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    env["PYTHONUNBUFFERED"] = "1"
    return env | (extra or {})


def training_command(*args: str | Path) -> list[str]:
    """`python -m training.main ...`"""
    return [sys.executable, "-m", "training.main", *map(str, args)]


def torchrun_command(
    nproc: int, *args: str | Path, nnodes: int = 1, node_rank: int = 0, port: int | None = None
) -> list[str]:
    """`torchrun --nproc-per-node ... -m training.main ...`, static rendezvous at a free port of 127.0.0.1."""
    launch = [f"--nproc-per-node={nproc}", f"--nnodes={nnodes}", f"--node-rank={node_rank}"]
    launch += ["--master-addr=127.0.0.1", f"--master-port={port or free_port()}"]
    return [sys.executable, "-m", "torch.distributed.run", *launch, "-m", "training.main", "--", *map(str, args)]


def start_training(*args: str | Path, env: dict[str, str] | None = None) -> Running:
    """Starts one training process; use as a context manager."""
    return Running(training_command(*args), env)


def run_training(*args: str | Path, env: dict[str, str] | None = None, timeout_s: float = 120.0) -> Finished:
    """Runs one training process to its end."""
    with start_training(*args, env=env) as running:
        return running.finish(timeout_s)


@contextlib.contextmanager
def start_ranks(
    size: int, *args: str | Path, module: Sequence[str] = ("training.main",), env: dict[str, str] | None = None
) -> Iterator[list[Running]]:
    """`python -m MODULE ...` as `size` ranks, without a launcher that would end them together."""
    port = str(free_port())
    common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    places = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    command = [sys.executable, "-m", *module, *map(str, args)]
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Running(command, place | (env or {}))) for place in places]


def start_torchrun(nproc: int, *args: str | Path, env: dict[str, str] | None = None) -> Running:
    """Starts `nproc` ranks by torchrun; use as a context manager."""
    return Running(torchrun_command(nproc, *args), env)


def run_torchrun(
    nproc: int, *args: str | Path, env: dict[str, str] | None = None, timeout_s: float = 180.0
) -> Finished:
    """Runs `nproc` ranks by torchrun to their end."""
    with start_torchrun(nproc, *args, env=env) as running:
        return running.finish(timeout_s)
