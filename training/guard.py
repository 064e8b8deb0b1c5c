"""What happens when loss or gradient is not finite. Every rank sees the same flags, so all act alike.

The update itself was already left out on the device; here the host learns of it one step later, so that it
never waits for the step that is running.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from data import Batch
from training.distributed import World
from training.errors import NonFiniteError
from training.step import StepResult

log = logging.getLogger(__name__)
_SHOWN = 4


@dataclass(frozen=True)
class _Pending:
    step: int
    result: StepResult
    keys: list[str]
    shards: list[str]


class NonFiniteGuard:
    """Counts updates left out; ends the run when `policy` is stop, or after more than `limit` in a row."""

    def __init__(self, policy: str, limit: int, world: World):
        self._allowed = 0 if policy == "stop" else limit
        self._world = world
        self._pending: _Pending | None = None
        self._in_a_row = 0
        self.skipped_steps = 0

    def observe(self, step: int, result: StepResult, batch: Batch) -> None:
        """Judge the previous step and remember this one. Raises NonFiniteError on all ranks alike."""
        self.settle()
        self._pending = _Pending(step, result, batch.keys, batch.shards)

    def settle(self) -> None:
        """Judge the step that is remembered, waiting for it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if not bool(pending.result.skipped):  # Host sync: of the step before the running one.
            self._in_a_row = 0
            return
        self._in_a_row += 1
        self.skipped_steps += 1
        message = self._describe(pending)
        if self._in_a_row > self._allowed:
            raise NonFiniteError(f"{message}; {self._in_a_row} in a row. The last checkpoint is from before them")
        log.warning("%s; the update was left out", message)

    def _describe(self, pending: _Pending) -> str:
        shards = ", ".join(sorted(set(pending.shards))[:_SHOWN])
        loss, norm = float(pending.result.loss), float(pending.result.grad_norm)
        return (
            f"step {pending.step}: loss {loss:g}, gradient norm {norm:g} "
            f"on rank {self._world.rank} with samples {', '.join(pending.keys[:_SHOWN])}... of {shards}"
        )
