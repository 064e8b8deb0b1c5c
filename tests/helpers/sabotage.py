"""`python -m tests.helpers.sabotage FAULT RANK STEP FLAGS`: training, with one rank that fails or hangs at a step.

Knows the names of a few of the trainer's methods, where it puts the fault.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from data import DataError, TrainLoader
from training.errors import ConfigError
from training.feed import Feed
from training.leave import leave
from training.main import main
from training.step import TrainStep


def held_up_for_ever() -> None:
    """A call that does not return; its name is to be found in a report."""
    while True:
        time.sleep(0.1)


def held_up_for_a_while() -> None:
    """The same, until another process has seen enough."""
    while not os.path.exists(os.environ["RELEASE"]):
        time.sleep(0.1)


def _raise(error: Exception) -> None:
    raise error


FAULTS: dict[str, tuple[type, str, Callable[[], None]]] = {
    "bug-in-step": (TrainStep, "__call__", lambda: _raise(RuntimeError("out of luck"))),
    "config-error-in-step": (TrainStep, "__call__", lambda: _raise(ConfigError("no such thing"))),
    "data-error": (TrainLoader, "__next__", lambda: _raise(DataError("not for sharing"))),
    "hang-in-data": (Feed, "_take", held_up_for_ever),
    "pause-in-data": (Feed, "_take", held_up_for_a_while),
}


def sabotage(fault: str, rank: int, step: int) -> None:
    """From call number `step` of a method on, `rank` misbehaves."""
    owner, name, misbehave = FAULTS[fault]
    original = getattr(owner, name)
    calls = 0

    def method(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= step and int(os.environ.get("RANK", 0)) == rank:
            misbehave()
        return original(self, *args)

    setattr(owner, name, method)


if __name__ == "__main__":
    sabotage(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    leave(main(sys.argv[4:]))
