"""What loader workers are at, as seen from the trainer, even when they no longer answer. Knows no ranks and no batches.

Each worker writes a page of shared memory: no lock, no system call, so that it costs nothing beside a picture that
is decoded. Its Python stack it writes into a file without a name, on a signal, also from inside a call that hangs.
"""

from __future__ import annotations

import contextlib
import enum
import faulthandler
import mmap
import os
import re
import signal
import struct
import time
from dataclasses import dataclass, replace
from multiprocessing import reduction
from typing import Any

from data.urls import mask_url

_PAGE = mmap.PAGESIZE
_FIXED = struct.Struct("=qiHHHd")  # pid, stack's file, doing, lengths of shard and sample, since
_TEXT = _FIXED.size + 8  # after the counter of writes
_COUNTER = struct.Struct("=Q")
_MAX_TEXT = (_PAGE - _TEXT) // 2
_STACK_FILE = "clipyard-stack"
_STACK_SIGNAL = signal.SIGRTMIN + 6 if hasattr(signal, "SIGRTMIN") else None
_ANSWER_S = 1.0
_ALL_ANSWERS_S = 2.0
_SETTLED_S = 0.05
_MAX_FRAMES = 12
_FRAME = re.compile(r'File "(?P<path>.*)", line (?P<line>\d+) in (?P<name>.*)')
_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "in an uninterruptible wait (disk or network file system)",
    "T": "stopped",
    "t": "held by a debugger",
    "Z": "dead",
    "X": "dead",
}


class Doing(enum.IntEnum):
    """What a worker is at. `sample` is the last one that it took, except while reading: the next of its shard."""

    STARTING = 0
    READING = 1  # nothing to prepare: waits for its storage
    PREPARING = 2
    AHEAD = 3  # has prepared as much as it may


@dataclass(frozen=True)
class WorkerState:
    """A loader process as the system and its own notes describe it.

    process: "running", "sleeping", "stopped" and so on, or "gone". stack: innermost frame last, one a line.
    """

    number: int
    pid: int
    process: str
    doing: str
    seconds: float
    shard: str
    sample: str
    stack: tuple[str, ...] = ()
    stack_file: int = -1  # of the process; it can be asked for its stack

    @property
    def is_idle(self) -> bool:
        """True when there is nothing that the trainer could be waiting for."""
        return self.doing == Doing.AHEAD.name.lower() and self.process in ("running", "sleeping")


class Pages:
    """One page for each of `count` workers, shared with the processes that get this object when they are started."""

    def __init__(self, count: int):
        self._count = count
        self._file = os.memfd_create("clipyard-status")
        os.ftruncate(self._file, max(1, count) * _PAGE)
        self._memory = mmap.mmap(self._file, max(1, count) * _PAGE)

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self._count, "file": reduction.DupFd(self._file)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._count = state["count"]
        self._file = state["file"].detach()
        self._memory = mmap.mmap(self._file, max(1, self._count) * _PAGE)

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self._file)

    def note(self, worker: int) -> Note:
        """The page of worker number `worker`, to write."""
        return Note(memoryview(self._memory)[worker * _PAGE : (worker + 1) * _PAGE])

    def look(self, with_stacks: bool) -> list[WorkerState]:
        """The state of every worker. With `with_stacks`, those say where they are that can answer, within seconds."""
        states = [_look(number, self._page(number)) for number in range(self._count)]
        if with_stacks:
            until = time.monotonic() + _ALL_ANSWERS_S
            for state in sorted(states, key=lambda state: state.is_idle):
                if time.monotonic() < until:
                    states[state.number] = replace(state, stack=_ask_for_stack(state))
        return states

    def _page(self, worker: int) -> bytes:
        """A page that is not being written, if there comes such a moment: a stopped worker may be in the midst."""
        for _ in range(100):
            page = self._memory[worker * _PAGE : (worker + 1) * _PAGE]
            (count,) = _COUNTER.unpack_from(page)
            if count % 2 == 0 and page[: _COUNTER.size] == self._memory[worker * _PAGE :][: _COUNTER.size]:
                break
        return page


class Note:
    """A worker's page, as the worker writes it. Use from one thread."""

    def __init__(self, page: memoryview | None = None):
        self._page = memoryview(bytearray(_PAGE)) if page is None else page
        self._writes = 0
        self._pid = os.getpid()
        self._stack_file = -1

    def begin(self) -> None:
        """To be called once in a worker process: from now on it can be asked for its stack."""
        if _STACK_SIGNAL is not None:
            self._stack_file = os.memfd_create(_STACK_FILE)
            faulthandler.register(_STACK_SIGNAL, file=self._stack_file, all_threads=True)
        self.write(Doing.STARTING)

    def write(self, doing: Doing, shard: str = "", sample: str = "") -> None:
        """What the worker is at from now on."""
        shard_bytes, sample_bytes = shard.encode()[:_MAX_TEXT], sample.encode()[:_MAX_TEXT]
        text = shard_bytes + sample_bytes
        # Order matters: an odd count tells a reader that it sees half a note.
        self._count()
        _FIXED.pack_into(
            self._page,
            _COUNTER.size,
            *(self._pid, self._stack_file, doing, len(shard_bytes), len(sample_bytes), time.monotonic()),
        )
        self._page[_TEXT : _TEXT + len(text)] = text
        self._count()

    def _count(self) -> None:
        self._writes += 1
        _COUNTER.pack_into(self._page, 0, self._writes)


def _look(number: int, page: bytes) -> WorkerState:
    pid, stack_file, doing, shard_length, sample_length, since = _FIXED.unpack_from(page, _COUNTER.size)
    shard = page[_TEXT : _TEXT + shard_length].decode(errors="replace")
    sample = page[_TEXT + shard_length : _TEXT + shard_length + sample_length].decode(errors="replace")
    return WorkerState(
        number,
        pid,
        process_state(pid) if pid else "not yet started",
        Doing(doing).name.lower(),
        time.monotonic() - since if pid else 0.0,
        mask_url(shard),
        sample,
        stack_file=stack_file,
    )


def process_state(pid: int) -> str:
    """What the system says of a process of this host: "running", "stopped", "gone", ..."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name in parentheses may hold anything, parentheses too.
            letter = file.read().rpartition(b")")[2].split()[0].decode()
    except (OSError, IndexError):
        return "gone"
    return _STATES.get(letter, letter)


def _ask_for_stack(worker: WorkerState) -> tuple[str, ...]:
    """Nothing where the process cannot answer; a stopped one would do so later, when nobody listens."""
    if worker.process not in ("running", "sleeping") or worker.stack_file < 0:
        return ()
    path = f"/proc/{worker.pid}/fd/{worker.stack_file}"
    try:
        # The number may be another process's by now, which the signal would end.
        if _STACK_FILE not in os.readlink(path):
            return ()
        with open(path, "rb") as file:
            start = file.seek(0, os.SEEK_END)
            assert _STACK_SIGNAL is not None
            os.kill(worker.pid, _STACK_SIGNAL)
            _wait_for_growth(file.fileno(), start)
            file.seek(start)
            return stack_of(file.read().decode(errors="replace"))
    except OSError:
        return ()


def _wait_for_growth(file: int, start: int) -> None:
    """Returns when the file is longer than `start` and has stopped growing, or after a second."""
    deadline, size = time.monotonic() + _ANSWER_S, start
    while time.monotonic() < deadline:
        time.sleep(_SETTLED_S)
        now = os.fstat(file).st_size
        if now == size > start:
            return
        size = now


def stack_of(dump: str) -> tuple[str, ...]:
    """The frames of a faulthandler dump, outermost first, of the main thread and of threads that are at work."""
    threads = [_FRAME.findall(part) for part in re.split(r"^(?:Current thread|Thread) .*$", dump, flags=re.MULTILINE)]
    threads = [frames for frames in threads if frames]
    lines: list[str] = []
    for frames in threads:
        is_main = frames is threads[-1]
        if is_main or any(name == "_do" and path.endswith("background.py") for path, _, name in frames):
            lines.append("main thread" if is_main else "reading thread")
            lines += [f"  {short_path(path)}:{line} {name}" for path, line, name in frames[:_MAX_FRAMES][::-1]]
    return tuple(lines)


def short_path(path: str) -> str:
    """The last two parts of a path: enough to find the file."""
    return "/".join(path.split("/")[-2:])
