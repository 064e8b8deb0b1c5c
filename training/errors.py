"""The three errors a user can cause, and the exit codes of the program.

A class attribute carries the exit code, so that `main` needs no table: 2 means that the same command
will fail again (do not requeue), 1 that it may succeed on another try.
"""

from __future__ import annotations

from data.errors import DataConfigError, DataError
from models.errors import CheckpointError, ConfigError

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_PREEMPTED = 75


class PeerError(RuntimeError):
    """Another rank met an error; this rank stops with it. Carries the other rank's exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class LostRankError(PeerError):
    """Another rank is gone, or the way to it. Raised where it is to be said: the lost one can no longer do so."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint could not be written. The last good one is untouched; another try may succeed."""

    exit_code = EXIT_FAILED


class FolderError(ConfigError):
    """The run's folder cannot be written now: a full disk, a file system that is read-only or gone."""

    exit_code = EXIT_FAILED


class LaunchError(ConfigError):
    """The ranks did not come together: a host that is down, a port that is taken. Another try may succeed."""

    exit_code = EXIT_FAILED


class RemoteError(CheckpointError):
    """The remote of --remote-sync did not do what it was asked for; another try may succeed."""

    exit_code = EXIT_FAILED


class NonFiniteError(RuntimeError):
    """Loss or gradient was not finite more often than allowed."""

    exit_code = EXIT_FAILED


def first_line(error: BaseException, limit: int = 300) -> str:
    """What the error says, or its class where it says nothing; other libraries' messages may be pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]


def describe_os_error(error: OSError) -> str:
    """`FILE: reason`, without the number."""
    return ": ".join(str(part) for part in (error.filename, error.strerror or str(error)) if part)


class StoppedEarly(Exception):
    """A rank was asked to stop before there was anything to save; raised on all ranks alike."""

    exit_code = EXIT_PREEMPTED


class OutOfMemoryError(RuntimeError):
    """Memory did not suffice. Whether it will on another node, nobody knows."""

    exit_code = EXIT_FAILED


# What ends a run with one line and no traceback.
UserError = (ConfigError, DataError, CheckpointError, NonFiniteError, OutOfMemoryError, LostRankError)

__all__ = [
    "EXIT_CONFIG",
    "EXIT_DONE",
    "EXIT_FAILED",
    "EXIT_PREEMPTED",
    "CheckpointError",
    "CheckpointWriteError",
    "ConfigError",
    "DataConfigError",
    "DataError",
    "FolderError",
    "LaunchError",
    "LostRankError",
    "NonFiniteError",
    "OutOfMemoryError",
    "PeerError",
    "RemoteError",
    "StoppedEarly",
    "UserError",
    "describe_os_error",
    "first_line",
]
