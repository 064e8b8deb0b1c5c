"""Lets a test have the machine for itself while other workers run tests too. Knows file locks, not tests.

Everybody passes a gate to a room: many at once, or one alone. Who waits for an empty room stands in the gate, so
that nobody overtakes.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def turn(folder: Path, *, alone: bool) -> Iterator[None]:
    """Inside, nobody is in the room of `folder` with an `alone` one. Workers name the same folder."""
    with open(folder / "gate.lock", "w") as gate, open(folder / "room.lock", "w") as room:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            # Closing would not do: a forked child of the test may hold the file open for longer.
            fcntl.flock(room, fcntl.LOCK_UN)
