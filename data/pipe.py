"""The output of a command as a byte stream: `pipe:aws s3 cp s3://bucket/a.tar -`.

A command stands in a process group of its own, so that a whole pipeline can be ended. A guard, one small shell
for each process that reads from commands, ends those that are left when their reader is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import select
import shutil
import signal
import subprocess
import tempfile
from typing import IO, Any

from data.background import PER_PROCESS
from data.errors import StorageError
from data.stream import ByteStream, Retry
from data.urls import mask_url

_ATTEMPTS = 3
_PATIENCE = 10  # times the silence of a server: a command may retry by itself before it says anything
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

# A command begins when the guard knows of it. Of a reader that is killed before that, this is the end of input.
_GATE = 'read -r go || exit 1; exec "$@" </dev/null'


class Command:
    """A running command in a process group of its own; whoever leaves early ends it, silently."""

    def __init__(self, url: str, silence_s: float = 300.0):
        self._url = url
        # Not a pipe: one that nobody reads would block the command.
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = self._start(url.removeprefix("pipe:").strip())
        assert self._process.stdout is not None
        raw = _Output(self._process.stdout, silence_s)
        self.output: IO[bytes] = io.BufferedReader(raw, _PIPE_BYTES)

    def _start(self, command: str) -> subprocess.Popen[bytes]:
        shell = shutil.which("bash")
        # Without pipefail the failure of all but the last command of `a | b` is lost.
        argv = [shell, "-o", "pipefail", "-c", command] if shell else ["/bin/sh", "-c", command]
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", _GATE, "sh", *argv],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=0,
                process_group=0,
            )
        except OSError as error:
            raise StorageError(mask_url(self._url), f"cannot start the command: {error}") from error
        assert process.stdout is not None and process.stdin is not None
        _tell_guard("+", process.pid)
        with contextlib.suppress(BrokenPipeError):  # ended by somebody else, which is told by its code
            process.stdin.write(b"go\n")
        process.stdin.close()
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


class _Output(io.RawIOBase):
    """Standard output of a command, which must not be silent for longer than `silence_s` seconds."""

    def __init__(self, pipe: IO[bytes], silence_s: float):
        self._pipe = pipe
        self._silence_s = silence_s
        self._ready = select.poll()
        self._ready.register(pipe.fileno(), select.POLLIN)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._ready.poll(self._silence_s * 1000):
            raise TimeoutError(f"the command wrote nothing for {self._silence_s:g} s")
        return os.readv(self._pipe.fileno(), [buffer])

    def close(self) -> None:
        self._pipe.close()
        super().close()


class PipeStream(ByteStream):
    """The output of a command. After a failure the command runs again and what had been read is skipped."""

    def __init__(self, url: str, offset: int, retry: Retry):
        self._url = url
        self._retry = retry
        self._left = min(retry.attempts, _ATTEMPTS)
        self.position = 0
        self._command = self._start()
        self._ended = False
        self.skip(offset)

    def read(self, size: int) -> bytes:
        """See `ByteStream.read`; the end is one only if the command ended with code 0."""
        data = b""
        while len(data) < size and not self._ended:
            try:
                part = self._command.output.read(size - len(data))
                self.position += len(part)
                data += part
                if len(data) < size:
                    self._command.check()
                    self._ended = True
            except TimeoutError as error:
                self._run_again(StorageError(mask_url(self._url), str(error), "unreachable"))
            except StorageError as error:
                self._run_again(error)
        return data

    def _start(self) -> Command:
        return Command(self._url, self._retry.silence_s * _PATIENCE)

    def _run_again(self, error: StorageError) -> None:
        """Another run, at the byte where the last one failed."""
        while True:
            self._left -= 1
            if self._left <= 0 or error.kind in ("missing", "denied"):
                raise error
            self._retry.pause(_ATTEMPTS - self._left)
            self._command.close()
            self._command = self._start()
            try:
                return self._skip_what_was_read()
            except TimeoutError as again:
                error = StorageError(mask_url(self._url), str(again), "unreachable")
            except StorageError as again:
                error = again

    def _skip_what_was_read(self) -> None:
        left = self.position
        while left and (data := self._command.output.read(min(_PIPE_BYTES, left))):
            left -= len(data)
        if left:
            self._command.check()
            reason = f"the command gave {self.position - left} bytes where it had given {self.position} before"
            raise StorageError(mask_url(self._url), reason)

    def close(self) -> None:
        """Ends the command; one that we leave early has not failed."""
        self._command.close()


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
