"""The output of a command as a byte stream: `pipe:aws s3 cp s3://bucket/a.tar -`.

A command stands in a process group of its own, so that a whole pipeline can be ended. A guard, one small shell
for each process that reads from commands, ends those that are left when their reader is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
from typing import IO

from data.background import PER_PROCESS
from data.errors import StorageError
from data.urls import mask_url

_PIPE_BYTES = 1 << 20  # the most that an unprivileged process may ask for by default
_MISSING = ("404", "nosuchkey", "nosuchbucket", "no such file", "not found", "does not exist")
_DENIED = ("403", "accessdenied", "access denied", "permission denied", "unable to locate credentials", "forbidden")
# Reads "+ GROUP" and "- GROUP"; at the end of its input, which is the end of its reader, it kills what is left.
_GUARD = """
trap '' HUP INT TERM USR1 USR2
groups=' '
while read -r change group; do
  case $change in
    +) groups="$groups$group " ;;
    -) groups="${groups%% $group *} ${groups#* $group }" ;;
  esac
done
for group in $groups; do kill -9 "-$group"; done
"""


class Command:
    """A running command in a process group of its own; whoever leaves early ends it, silently."""

    def __init__(self, url: str):
        self._url = url
        # Not a pipe: one that nobody reads would block the command.
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = self._start(url.removeprefix("pipe:").strip())
        assert self._process.stdout is not None
        self.output: IO[bytes] = self._process.stdout

    def _start(self, command: str) -> subprocess.Popen[bytes]:
        shell = shutil.which("bash")
        # Without pipefail the failure of all but the last command of `a | b` is lost.
        argv = [shell, "-o", "pipefail", "-c", command] if shell else ["/bin/sh", "-c", command]
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=_PIPE_BYTES,
                process_group=0,
            )
        except OSError as error:
            raise StorageError(mask_url(self._url), f"cannot start the command: {error}") from error
        assert process.stdout is not None
        _tell_guard("+", process.pid)
        with contextlib.suppress(OSError):
            fcntl.fcntl(process.stdout.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        return process

    def check(self) -> None:
        """After the last byte: raises StorageError if the command failed, with the last lines it wrote to stderr."""
        code = self._process.wait()
        # 141 under pipefail: a part of the pipeline wrote to one that had, by intention, read enough (`head`).
        if code not in (0, 128 + signal.SIGPIPE):
            self._errors.seek(max(0, os.fstat(self._errors.fileno()).st_size - 2000))
            said = self._errors.read().decode(errors="replace").strip()
            lines = " | ".join(said.splitlines()[-3:]) or "it said nothing"
            raise StorageError(
                mask_url(self._url), f"the command ended with code {code}: {mask_url(lines)}", _kind(said)
            )

    def close(self) -> None:
        """Ends the command if it still runs."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
        self.output.close()
        self._process.wait()
        _tell_guard("-", self._process.pid)
        self._errors.close()


def _tell_guard(change: str, group: int) -> None:
    guard = PER_PROCESS.get("pipe guard", _start_guard)
    with contextlib.suppress(OSError):  # somebody killed the guard: the commands are not worse off than without
        os.write(guard, f"{change} {group}\n".encode())


def _start_guard() -> int:
    """Starts the guard in a session of its own, out of reach of what ends this process; its standard input."""
    read_end, write_end = os.pipe()
    files = [
        (os.POSIX_SPAWN_DUP2, read_end, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
    ]
    try:
        os.posix_spawn("/bin/sh", ["sh", "-c", _GUARD], os.environ, file_actions=files, setsid=True)
    finally:
        os.close(read_end)
    return write_end


def _kind(said: str) -> str:
    text = said.lower()
    if any(word in text for word in _MISSING):
        return "missing"
    return "denied" if any(word in text for word in _DENIED) else "unreadable"
