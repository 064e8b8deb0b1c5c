"""How long ranks wait for each other: long until the first step is done, short after it, long where work is uneven.

Knows process groups, not what they are used for. A time-out belongs to the operation that begins under it, so ranks
need not switch at the same moment; but what one rank may do alone for long must lie inside `patient` on all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from training.config import ClusterConfig

_STARTUP_S = 1800.0
_STALL_S = 120.0


@dataclass(frozen=True)
class Limits:
    """Seconds: until the first step is done, after it, and until a stall is reported (0: never)."""

    startup_s: float
    running_s: float
    stall_s: float


def limits_of(cluster: ClusterConfig) -> Limits:
    """What is not given follows from what is: the report comes before the time-out, the start may take longest."""
    running = cluster.dist_timeout_s
    startup, stall = cluster.dist_startup_timeout_s, cluster.stall_timeout
    return Limits(
        startup_s=max(_STARTUP_S, running) if startup is None else startup,
        running_s=running,
        stall_s=min(_STALL_S, running / 3) if stall is None else stall,
    )


class Timeouts:
    """The time-outs of some process groups, which join `groups` when they are made."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self.groups: list[dist.ProcessGroup] = []
        self._started = False
        self._depth = 0

    @property
    def current_s(self) -> float:
        """Seconds that an agreement which begins now may take."""
        return self._limits.running_s if self._started and not self._depth else self._limits.startup_s

    @property
    def flag(self) -> str:
        """Which setting `current_s` is."""
        return "--dist-timeout-s" if self._started and not self._depth else "--dist-startup-timeout-s"

    def settle(self) -> None:
        """The first step is done: what took long at the start need not be allowed for any more."""
        self._started = True
        self._apply()

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Inside, ranks wait for each other as long as at the start. Must end with an agreement of all ranks."""
        self._depth += 1
        self._apply()
        try:
            yield
        finally:
            self._depth -= 1
            self._apply()

    def _apply(self) -> None:
        limit = timedelta(seconds=self.current_s)
        for group in self.groups:
            _set_timeout(limit, group)


def _set_timeout(limit: timedelta, group: dist.ProcessGroup) -> None:
    # Older torch has it by another name only. Gloo of 2.8 takes no notice: there `training.health` watches the clock.
    public = getattr(dist, "set_timeout", None)
    (public or dist.distributed_c10d._set_pg_timeout)(limit, group)
