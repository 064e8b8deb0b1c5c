"""Where loader workers come from, and how they go when the trainer does. Knows nothing of what they load.

Python's own fork server is one for the whole process, started by whoever asks first: with other modules loaded,
and open to the signals by which a cluster ends a run, which take it and its children's exit codes along. This
one serves the loader alone, has imported torch once, and cannot be signalled away.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import shutil
import signal
import tempfile
import threading
from multiprocessing import forkserver, popen_forkserver, reduction, resource_tracker, spawn, util
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import SemLock

from data.background import PER_PROCESS

_M_ARENA_MAX = -8  # malloc.h
# Of 107 bytes of a socket's path: /pymp-12345678/listener-12345678 stands behind it.
_LONGEST_FOLDER = 107 - 33
RUN_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# Nothing of ours: the server has not the import path of the process that starts it, and might find another `data`.
_PRELOAD = ["torch", "torch.utils.data", "PIL.Image", "simplejpeg"]


class WorkerContext(multiprocessing.context.ForkServerContext):
    """A multiprocessing context; its processes are children of this process's server of loader workers."""

    def __init__(self) -> None:
        super().__init__()
        self._known = set(util._finalizer_registry)  # type: ignore[attr-defined]
        _server()

    def forget_names(self) -> None:
        """Removes the names of the semaphores made here, once every worker has opened them.

        Otherwise they are removed at the end, which a SIGKILL to the process group takes from us: Python's
        resource tracker is in that group, too.
        """
        for key, finalizer in list(util._finalizer_registry.items()):  # type: ignore[attr-defined]
            if key not in self._known and finalizer._callback is SemLock._cleanup:  # type: ignore[attr-defined]
                finalizer()


class WorkerProcess(multiprocessing.context.ForkServerProcess):
    """A child of the server of loader workers."""

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> popen_forkserver.Popen:
        return _Popen(process_obj)


WorkerContext.Process = WorkerProcess


class _Popen(popen_forkserver.Popen):
    """Asks our server, where the class above asks Python's one; the protocol is the same."""

    def _launch(self, process_obj: BaseProcess) -> None:
        message = io.BytesIO()
        multiprocessing.context.set_spawning_popen(self)
        try:
            reduction.dump(spawn.get_preparation_data(process_obj.name), message)
            reduction.dump(process_obj, message)
        finally:
            multiprocessing.context.set_spawning_popen(None)
        self.sentinel, data = _server().connect_to_new_process(self._fds)  # type: ignore[attr-defined]
        # The child takes the end of this pipe for the end of its parent.
        alive = os.dup(data)
        self.finalizer = util.Finalize(self, util.close_fds, (alive, self.sentinel))  # type: ignore[attr-defined]
        with open(data, "wb") as pipe:
            pipe.write(message.getbuffer())
        self.pid = forkserver.read_signed(self.sentinel)


def server_pid() -> int:
    """The process id of this process's server of loader workers."""
    pid = _server()._forkserver_pid  # type: ignore[attr-defined]
    assert pid is not None
    return int(pid)


def _server() -> forkserver.ForkServer:
    """The running server, with the end-of-run signals blocked, which its children inherit."""
    server = PER_PROCESS.get("fork server", forkserver.ForkServer)
    server.set_forkserver_preload(_PRELOAD)
    resource_tracker.ensure_running()
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, RUN_SIGNALS)
    try:
        _keep_sockets_short()
        server.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
    return server


def _keep_sockets_short() -> None:
    """Sockets lie in the folder for temporary files; jobs are given ones whose paths are too long for a socket's."""
    if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_FOLDER:
        configured, tempfile.tempdir = tempfile.tempdir, "/tmp"
        try:
            util.get_temp_dir()  # made at the first call, and kept
        finally:
            tempfile.tempdir = configured


def share_arenas() -> None:
    """In a worker: its threads allocate from two arenas, not from one each, where blocks come and go between them.

    glibc's own limit is eight arenas a core, and each keeps the most that it ever held.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


def scratch_folder() -> str | None:
    """Where multiprocessing keeps this process's sockets; None where it shares them with the process it came from."""
    return util.get_temp_dir() if multiprocessing.parent_process() is None else None


def end_with_parent(scratch: str | None) -> None:
    """In a worker: kills it when the trainer is gone, whatever it waits for, and removes the trainer's `scratch`."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_follow, args=(parent.sentinel, scratch), name="follow", daemon=True).start()


def _follow(sentinel: int, scratch: str | None) -> None:
    multiprocessing.connection.wait([sentinel])
    if scratch is not None:
        shutil.rmtree(scratch, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGKILL)
