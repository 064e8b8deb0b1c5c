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


class NonFiniteError(RuntimeError):
    """Loss or gradient was not finite more often than allowed."""

    exit_code = EXIT_FAILED


# What ends a run with one line and no traceback.
UserError = (ConfigError, DataError, CheckpointError, NonFiniteError, LostRankError)

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
    "LostRankError",
    "NonFiniteError",
    "PeerError",
    "UserError",
]
