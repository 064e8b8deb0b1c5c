"""The right to evaluate a run, which one process has at a time, on any file system that several machines share.

A file names the holder, and a thread touches it while the holder lives: locks of the system do not reach across every
network file system. Who finds the file watches it for a while by its own clock; only a silent one is taken over.
Knows nothing of what the right is for.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from training.errors import ConfigError, FolderError

log = logging.getLogger(__name__)

FILE_NAME = "evaluations.lock"
BEAT_S = 5.0
# Attributes of files are a minute old on some network file systems.
SILENT_S = 90.0
_SETTLES_S = 0.2
_MAY_PASS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)


@dataclass(frozen=True)
class Holder:
    """Who holds a claim; `token` is its own alone."""

    host: str = "an unknown host"
    pid: int = 0
    token: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Claim:
    """The claim on `folder`, a context manager; waiting for a silent holder's end may take `silent_s`.

    Raises ConfigError when another process holds it and lives, or when the folder cannot be written.
    """

    def __init__(self, folder: Path, beat_s: float = BEAT_S, silent_s: float = SILENT_S):
        self.path = folder / FILE_NAME
        self._beat_s, self._silent_s = beat_s, silent_s
        self._own = Holder(socket.gethostname(), os.getpid(), uuid.uuid4().hex)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claim", daemon=True)

    def __enter__(self) -> Claim:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._take():
                self._wait_for_silence()
        except OSError as error:
            kind = FolderError if error.errno in _MAY_PASS else ConfigError
            raise kind(
                f"{self.path} cannot be written: {error.strerror}; --output names another folder for the figures"
            ) from error
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._is_own():
                self.path.unlink()

    def check(self) -> None:
        """Raises FolderError when another process has taken over meanwhile, as from one that was asleep for long."""
        if not self._is_own():
            holder = _read(self.path)
            raise FolderError(f"{self.path} is no longer this process's: {holder or 'it is gone'}")

    def _take(self) -> bool:
        """True when the file is this process's; makes it, if there is none."""
        try:
            with self.path.open("x", encoding="utf-8") as file:
                file.write(json.dumps(asdict(self._own)))
        except FileExistsError:
            return self._is_own()
        return True

    def _wait_for_silence(self) -> None:
        """Return when the file may be asked for again. Raises ConfigError at the holder's first sign of life."""
        holder, touched = _read(self.path), _touched(self.path)
        if holder is None:
            return
        deadline = time.monotonic() + (0 if _has_ended(holder) else self._silent_s)
        if time.monotonic() < deadline:
            log.info("%s may evaluate this run: watching it for up to %g s", holder, self._silent_s)
        while time.monotonic() < deadline:
            time.sleep(min(0.5, self._beat_s / 2))
            if _read(self.path) != holder:
                return
            if _touched(self.path) != touched:
                raise ConfigError(
                    f"{holder} evaluates this run already ({self.path}); end it first, or give --output FOLDER"
                )
        self._take_over(holder)

    def _take_over(self, holder: Holder) -> None:
        """Put an own file in the silent one's place; of several who do so, the last one has it."""
        log.info("%s has ended without a word: going on in its place", holder)
        mine = self.path.with_name(f".{FILE_NAME}-{self._own.token}")
        mine.write_text(json.dumps(asdict(self._own)), encoding="utf-8")
        mine.replace(self.path)
        time.sleep(_SETTLES_S)

    def _is_own(self) -> bool:
        holder = _read(self.path)
        return holder is not None and holder.token == self._own.token

    def _beat(self) -> None:
        while not self._is_over.wait(self._beat_s):
            with contextlib.suppress(OSError):
                if self._is_own():
                    os.utime(self.path)


def _read(path: Path) -> Holder | None:
    """None where there is no file. One that is being written has an unknown holder."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        return Holder()


def _touched(path: Path) -> int:
    # Opened first: that is what makes a network file system ask its server.
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return 0


def _has_ended(holder: Holder) -> bool:
    """True where that can be known at once: on this host."""
    if holder.host != socket.gethostname():
        return False
    if holder.pid == os.getpid():
        return True  # an earlier process of this number
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False
