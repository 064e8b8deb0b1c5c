"""Which checkpoint of a watched run is evaluated next, which is not at all, and when no more will come. Rank 0 only.

Knows names, manifests and what is missing; evaluates nothing and talks to no other rank.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from training.errors import RemoteError
from training.evaluation.ledger import Ledger, Measurement
from training.evaluation.watched import WatchedRun, is_last, oldest_first
from training.manifest import MANIFEST, Manifest, parse_manifest

log = logging.getLogger(__name__)

# A set whose storage fails is tried again with later looks at the run, so many times in all.
_ATTEMPTS = 3


@dataclass(frozen=True)
class Choice:
    """Which checkpoints are wanted, and until when.

    every: of checkpoints between epochs, those whose step is a multiple of this.
    once: those that are there now. idle_minutes: without a new one for so long, the end.
    """

    epochs_only: bool = False
    every: int = 1
    once: bool = False
    idle_minutes: float | None = None

    def takes(self, name: str, manifest: Manifest) -> bool:
        """True for a checkpoint that is wanted; ends of epochs all are."""
        return name.startswith("epoch_") or (not self.epochs_only and manifest.step % self.every == 0)

    def is_idle_since(self, moment: float) -> bool:
        """Whether nothing new has come for too long, since `moment` of the monotonic clock."""
        return self.idle_minutes is not None and time.monotonic() - moment > 60 * self.idle_minutes


@dataclass(frozen=True)
class Arrival:
    """A whole checkpoint, and what of it nobody has measured yet."""

    name: str
    text: str
    manifest: Manifest
    missing: tuple[Measurement, ...]

    def __str__(self) -> str:
        return f"{self.name} (step {self.manifest.step})"


@dataclass(frozen=True)
class View:
    """What is to be evaluated, oldest first; and why this was the last look, where it was."""

    arrivals: tuple[Arrival, ...] = ()
    end: str = ""


class Lookout:
    """Looks at a run again and again; is told what became of each arrival."""

    def __init__(self, run: WatchedRun, ledger: Ledger, wanted: Sequence[Measurement], choice: Choice):
        self._run, self._ledger, self._wanted, self._choice = run, ledger, wanted, choice
        self._failures: Counter[tuple[str, str, Measurement | None]] = Counter()
        self._damaged: set[tuple[str, str]] = set()
        self._manifests: dict[str, str | None] = {}
        self._news_at = time.monotonic()
        self._trouble, self._is_waiting = "", False

    def look(self) -> View:
        """A remote that no longer answers is told once, and asked again. Raises RemoteError when it never has."""
        try:
            view = self._look()
        except RemoteError as error:
            if not self._manifests:
                raise
            if str(error) != self._trouble:
                log.warning("%s; looking again", error)
            self._trouble = str(error)
            return View(end=self._idle())
        self._trouble = ""
        return view

    def _look(self) -> View:
        manifests = self._run.manifests()
        if manifests != self._manifests:
            self._manifests, self._news_at = manifests, time.monotonic()
            self._name_unreadable()
        arrivals = tuple(self._arrivals())
        return View(arrivals, "" if arrivals else self._end())

    def _name_unreadable(self) -> None:
        """A manifest that is not there yet may come; one that is damaged stays so."""
        for name, text in self._manifests.items():
            if text is not None and parse_manifest(text) is None and (name, text) not in self._damaged:
                log.error("%s is passed over: its %s is damaged", name, MANIFEST)
                self._damaged.add((name, text))

    def _arrivals(self) -> list[Arrival]:
        found = []
        for name, manifest in oldest_first(self._manifests):
            text = self._manifests[name] or ""
            if self._choice.takes(name, manifest) and (name, text) not in self._damaged:
                missing = self._ledger.missing(manifest, self._wanted)
                missing = [one for one in missing if self._failures[name, text, one] < _ATTEMPTS]
                found += [Arrival(name, text, manifest, tuple(missing))] if missing else []
        return found

    def _end(self) -> str:
        if self._choice.once:
            return "nothing is left to evaluate" if self._manifests else f"{self._run.name} has no checkpoint yet"
        whole = oldest_first(self._manifests)
        if whole and is_last(self._run, *whole[-1]):
            return "the run is complete, and its last checkpoint is evaluated"
        if not self._is_waiting:
            log.info("waiting for checkpoints of %s", self._run.name)
        self._is_waiting = True
        return self._idle()

    def _idle(self) -> str:
        return "no new checkpoint has come for long" if self._choice.is_idle_since(self._news_at) else ""

    # ---- what became of them

    def done(self, arrival: Arrival, measurement: Measurement) -> None:
        """It is in the ledger."""
        for what in (measurement, None):
            self._failures.pop((arrival.name, arrival.text, what), None)

    def failed(self, arrival: Arrival, measurement: Measurement | None = None) -> None:
        """A set of it, or all of it, could not be read; another try may succeed."""
        self._failures[arrival.name, arrival.text, measurement] += 1

    def damaged(self, arrival: Arrival) -> None:
        """It is not what its manifest says, and will not be looked at again as long as that is the same."""
        self._damaged.add((arrival.name, arrival.text))

    def num_failed(self) -> int:
        """Checkpoints of the last look that are not evaluated as was asked."""
        lost = {(name, text) for name, text, _ in self._failures} | self._damaged
        return sum((name, text) in lost for name, text in self._manifests.items())
