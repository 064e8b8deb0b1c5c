"""The next batch, or the reason why there is none, agreed by all ranks. Knows the loader, not the model.

One small collective on the host before each step carries everything that one rank may know alone: a signal, a
deadline, a save that is due by the clock, an error of its loader. So no rank steps while another stops.
"""

from __future__ import annotations

import enum
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from data import Batch, DataError, LoaderStats, Position, source_epochs
from training.distributed import World
from training.transfer import Transfer


class Loader(Protocol):
    """What the feed needs of a data loader."""

    def __iter__(self) -> Iterator[Batch]: ...
    def position(self) -> Position: ...
    def stats(self) -> LoaderStats: ...
    def close(self) -> None: ...


class Call(enum.IntEnum):
    """What a rank says before a step; the largest of all ranks' calls counts."""

    STEP = 0
    SAVE = 1
    STOP = 2
    ERROR = 3


class Feed:
    """Batches on the device; `position` is always that of the last batch handed out."""

    def __init__(
        self,
        loader: Loader,
        world: World,
        stop_requested: Callable[[], bool],
        earlier_counts: Mapping[str, int] | None = None,
        source_sizes: Mapping[str, int] | None = None,
    ):
        """`earlier_counts`: what `counts` said at the checkpoint from which the run goes on; `source_sizes`: samples
        of each source, where they are known.
        """
        self._source_sizes = source_sizes or {}
        self._loader = loader
        self._earlier_counts = Counter(earlier_counts or {})
        self._batches = iter(loader)
        self._world = world
        self._transfer = Transfer(world.device)
        self._stop_requested = stop_requested
        self._note()
        self.save_requested = False
        self.data_time_s = 0.0

    def next(self, save_due: bool = False) -> Batch | None:
        """The next batch, or None when the ranks agreed to stop. `save_requested` then says whether to save first.

        Raises DataError on every rank when one rank's loader failed.
        """
        self._world.pulse.enter("data")
        started = time.perf_counter()
        # Asked before too: the wait for a first batch, or for storage that stands still, may be a long one.
        stop = self._stop_requested()
        batch, error = (None, None) if stop else self._take()
        self.data_time_s = time.perf_counter() - started
        call = self._agree(error, stop or self._stop_requested(), save_due)
        if call is Call.ERROR:
            with self._world.collectively("data"):
                if error is not None:
                    raise error
        self.save_requested = call is Call.SAVE
        if call is Call.STOP:
            return None
        assert batch is not None
        self._world.pulse.took(batch.shards[-1], batch.keys[-1])
        self._note()
        return self._transfer(batch)

    def _note(self) -> None:
        """What a checkpoint holds is of the batches handed out; one that a stop leaves over counts for nothing."""
        self._position = self._loader.position()
        self._own_counts = self._loader.stats().counts()

    def _take(self) -> tuple[Batch | None, DataError | None]:
        try:
            return next(self._batches), None
        except DataError as error:
            return None, error

    def _agree(self, error: DataError | None, stop: bool, save_due: bool) -> Call:
        own = Call.STEP
        if error is not None:
            own = Call.ERROR
        elif stop:
            own = Call.STOP
        elif save_due:
            own = Call.SAVE
        return Call(self._world.max_int(int(own)))  # Collective:

    def positions(self) -> list[Position]:
        """Every rank's data position behind the last batch handed out, on rank 0; empty elsewhere. Collective."""
        return self._world.gather_object(self._position.compact()) or []

    def counts(self) -> dict[str, int]:
        """Samples and shards lost in the whole run, in all and by reason, and samples by source; over all ranks.

        On rank 0; elsewhere nothing to rely on. Collective.
        """
        totals = self._earlier_counts.copy()
        for counts in self._world.gather_object(self._own_counts) or []:  # Collective:
            totals.update(counts)
        return dict(sorted(totals.items()))

    def metrics(self) -> dict[str, float]:
        """`counts`, and how often each source has been gone through. Collective."""
        counts = self.counts()
        return counts | source_epochs(counts, self._source_sizes)

    def close(self) -> None:
        """End the loader's processes."""
        self._loader.close()
