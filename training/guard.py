"""What happens when loss or gradient is not finite. Every rank sees the same flag, so all act alike.

The update itself was already left out on the device; here the host learns of it one step later, so that it
never waits for the step that is running. Knows neither checkpoints nor how a run goes back to one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from data import Batch, mask_url
from training.config import OptimConfig
from training.distributed import World
from training.errors import NonFiniteError
from training.step import StepResult

_SHOWN = 4  # samples in a message
_MAX_NAMED = 4096  # samples in a record
_GRADIENT, _FEATURES = 1, 2  # how far back the trouble can be traced on a rank; 0: not at all

Note = Callable[[int, str, Mapping[str, Any]], None]  # step, line for the log, values for the metrics


class RollbackDue(Exception):
    """Too many updates were left out in a row, and the run is to go back. Raised on all ranks alike.

    first_bad: the first of those steps; last_done: the last step that was computed.
    """

    def __init__(self, first_bad: int, last_done: int, offences: list[dict[str, Any]]):
        super().__init__(f"steps {first_bad} to {last_done}")
        self.first_bad = first_bad
        self.last_done = last_done
        self.offences = offences


@dataclass(frozen=True)
class Offence:
    """A step that was not finite, with the ranks that had it first and, on rank 0, their samples."""

    step: int
    loss: float
    grad_norm: float
    cause: str  # features or gradient
    ranks: list[int]
    samples: list[tuple[str, str]]  # (key, shard); rows that are bad where they are known, else all of the ranks
    num_samples: int

    def to_json(self) -> dict[str, Any]:
        """Numbers, texts and containers; null for what is not finite."""
        shards: dict[str, list[str]] = {}
        for key, shard in self.samples:
            shards.setdefault(mask_url(shard), []).append(key)
        return {
            "step": self.step,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "grad_norm": self.grad_norm if math.isfinite(self.grad_norm) else None,
            "cause": self.cause,
            "ranks": self.ranks,
            "num_samples": self.num_samples,
            "samples": shards,
        }

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.ranks[:_SHOWN])) + (", ..." if len(self.ranks) > _SHOWN else "")
        keys = ", ".join(key for key, _ in self.samples[:_SHOWN]) + (", ..." if self.num_samples > _SHOWN else "")
        shards = ", ".join(sorted({mask_url(shard) for _, shard in self.samples[:_SHOWN]}))
        return (
            f"step {self.step}: loss {self.loss:g}, gradient norm {self.grad_norm:g}; not finite first in the "
            f"{self.cause} of rank{'s' if len(self.ranks) > 1 else ''} {ranks}, {self.num_samples} samples: "
            f"{keys} of {shards}"
        )


@dataclass(frozen=True)
class _Pending:
    step: int
    result: StepResult
    keys: list[str]
    shards: list[str]


class NonFiniteGuard:
    """Counts updates left out, and does what `--on-nonfinite` says after more than `--max-nonfinite` in a row."""

    def __init__(self, optim: OptimConfig, world: World, note: Note):
        """`note` is called on all ranks alike."""
        self._policy = optim.on_nonfinite
        self._allowed = 0 if optim.on_nonfinite == "stop" else optim.max_nonfinite
        self._world = world
        self._note = note
        self._pending: _Pending | None = None
        self._streak: list[Offence] = []

    def observe(self, step: int, result: StepResult, batch: Batch) -> None:
        """Judge the previous step and remember this one. Raises NonFiniteError or RollbackDue on all ranks alike."""
        self._judge(last_done=step)
        self._pending = _Pending(step, result, batch.keys, batch.shards)

    def settle(self) -> None:
        """Judge the step that is remembered, waiting for it. Raises as `observe`."""
        if self._pending is not None:
            self._judge(last_done=self._pending.step)

    def _judge(self, last_done: int) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if not bool(pending.result.skipped):  # Host sync: of the step before the running one.
            self._streak = []
            return
        offence = self._trace(pending)
        self._streak.append(offence)
        count = len(self._streak)
        self._note(
            pending.step,
            f"{offence}; the update was left out ({count} in a row, --max-nonfinite {self._allowed})",
            {"event/nonfinite": offence.to_json()},
        )
        if count > self._allowed:
            self._end_streak(last_done)

    def _end_streak(self, last_done: int) -> None:
        streak, self._streak = self._streak, []
        if self._policy == "rollback":
            raise RollbackDue(streak[0].step, last_done, [offence.to_json() for offence in streak])
        with self._world.collectively("--on-nonfinite"):
            if self._world.is_main:
                raise NonFiniteError(f"{streak[-1]}; {len(streak)} in a row. The last checkpoint is from before them")

    def _trace(self, pending: _Pending) -> Offence:
        """Which ranks had it first. All ranks come here together: `skipped` is the same on each."""
        own, world = pending.result.own, self._world
        rows = own.bad_rows.nonzero().flatten().tolist()  # Host sync: nothing is lost, the step was none.
        level = 0
        if rows:
            level = _FEATURES
        elif own.grad_norm is None or not math.isfinite(float(own.grad_norm)):
            level = _GRADIENT
        levels = world.all_gather_object(level)  # Collective:
        worst = max(levels)
        ranks = [rank for rank, found in enumerate(levels) if found == worst]
        samples: list[tuple[str, str]] = []
        if level == worst:
            rows = rows or list(range(len(pending.keys)))
            samples = [(pending.keys[row], pending.shards[row]) for row in rows]
        gathered = world.gather_object((len(samples), samples[: max(1, _MAX_NAMED // len(ranks))]))  # Collective:
        return Offence(
            pending.step,
            float(pending.result.loss),
            float(pending.result.grad_norm),
            "features" if worst == _FEATURES else "gradient",
            ranks,
            [sample for _, named in gathered or [] for sample in named],
            sum(count for count, _ in gathered or []),
        )
