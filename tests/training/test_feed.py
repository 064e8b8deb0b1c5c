from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from data import Batch, DataError, LoaderStats, Position
from data.cursors import LaneCursor
from training.distributed import World
from training.feed import Feed


class Counting:
    """A loader whose position and counts say how many batches were taken from it."""

    def __init__(self, fails_at: int | None = None):
        self.taken = 0
        self._fails_at = fails_at

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.taken += 1
        if self.taken == self._fails_at:
            raise DataError("no more")
        return Batch(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5), {}, ["a", "b"], ["s", "s"])

    def position(self) -> Position:
        return Position(1, 1, 0, {}, {0: LaneCursor(taken=self.taken)})

    def stats(self) -> LoaderStats:
        stats = LoaderStats()
        stats.source_samples["shard"] = 2 * self.taken
        return stats

    def close(self) -> None:
        pass


def _taken(feed: Feed) -> int:
    """Batches behind the position that a checkpoint would hold."""
    (position,) = feed.positions()
    return int(np.sum([cursor.taken for cursor in position.cursors.values()]))


def test_position_and_counts_are_those_of_the_batches_handed_out() -> None:
    feed = Feed(Counting(), World(), lambda: False, {"samples/shard": 100})
    assert (_taken(feed), feed.counts()["samples/shard"]) == (0, 100)
    for number in (1, 2):
        assert feed.next() is not None
        assert (_taken(feed), feed.counts()["samples/shard"]) == (number, 100 + 2 * number)


def test_a_batch_that_was_fetched_when_a_stop_was_asked_for_counts_for_nothing() -> None:
    loader = Counting()
    feed = Feed(loader, World(), lambda: loader.taken == 2)
    assert feed.next() is not None
    assert feed.next() is None
    assert loader.taken == 2
    assert (_taken(feed), feed.counts()["samples/shard"]) == (1, 2)


def test_a_stop_that_was_asked_for_before_does_not_wait_for_a_batch() -> None:
    loader = Counting()
    feed = Feed(loader, World(), lambda: True)
    assert feed.next() is None
    assert loader.taken == 0


def test_an_error_of_the_loader_comes_before_a_save_that_is_due() -> None:
    feed = Feed(Counting(fails_at=1), World(), lambda: False)
    with pytest.raises(DataError, match="no more"):
        feed.next(save_due=True)
