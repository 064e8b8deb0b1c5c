"""The order of a run's samples as pure functions of the seed. Knows no files, workers or time.

A run has C lanes, fixed at its start. A lane is an endless sequence of segments (pieces of shards): drawn
with replacement, or, per epoch, its range of the shards in a seeded permutation. Lanes are dealt to ranks
and workers in contiguous runs; which lane gives the next row of a batch follows from what each has given.

In a mixture with proportions every lane has a stream of its own for each source, with an `Order` of that
source alone; which stream gives the lane's next row again follows from what each has given.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.randomness import KeyedRandom

MAX_LANES_PER_RANK = 64
_FEW_LANES = 16
_FIRST_BLOCK = 32
_MAX_BLOCK = 1024
_TURN = 1 << 64
_LANE_STEP, _ROW_STEP = int(_TURN * (math.sqrt(2) - 1)), int(_TURN * (math.sqrt(5) - 1) / 2)


def lanes_per_rank(batch_size: int) -> int:
    """Lanes of a rank that takes `batch_size` rows a step: a divisor of it, so that all give equally many.

    It depends on the batch alone, so the order of samples does not depend on workers. At most 64 (each keeps
    a shard open) unless the batch has no divisor from 16 to 64; then the smallest above.
    """
    divisors = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
    best = max(n for n in divisors if n <= MAX_LANES_PER_RANK)
    if best >= _FEW_LANES or best == batch_size:
        return best
    return min(n for n in divisors if n > MAX_LANES_PER_RANK)


def deal(items: Sequence[int], parts: int, part: int) -> list[int]:
    """The contiguous run of `items` that belongs to `part` of `parts`; sizes differ by at most one."""
    start, stop = part * len(items) // parts, (part + 1) * len(items) // parts
    return list(items[start:stop])


def schedule_rows(taken: np.ndarray, num_rows: int) -> np.ndarray:
    """Which lane gives each of the next `num_rows` rows: the one that has given fewest, the lowest index first.

    taken: int64 [lanes], rows given so far. Returns int64 [num_rows]. Because it keeps no state, any number
    of ranks that divides the lanes evenly puts the same samples into a step.
    """
    assert len(taken), "a rank without lanes"
    rows: list[np.ndarray] = []
    missing = num_rows
    level = int(taken.min())
    while missing > 0:
        lanes = np.flatnonzero(taken <= level)[:missing]
        rows.append(lanes)
        missing -= len(lanes)
        level += 1
    return np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)


def streams_of(lane: int, num_streams: int) -> range:
    """The streams of a lane: with one stream a lane they have the lanes' numbers."""
    return range(lane * num_streams, (lane + 1) * num_streams)


@dataclass(frozen=True)
class Mixing:
    """Which stream of a lane gives its next row, when streams have `proportions` (positive, of any sum).

    Row r of lane l takes the point start + l a + r b (mod 1) and the stream on whose share of [0, 1) it lies. The
    multiples of b, the golden ratio, and of a, the square root of two, are spread over [0, 1) more evenly than
    those of other numbers (Kuipers and Niederreiter, "Uniform distribution of sequences", 1974, section 2.3): the
    points of one lane, and those of one row of all lanes, keep within 5 of the proportions for thousands of them.
    """

    seed: int
    proportions: tuple[float, ...]

    def stream(self, lane: int, row: int) -> int:
        """The stream for the lane's row number `row`."""
        point = (self._start + lane * _LANE_STEP + row * _ROW_STEP) % _TURN
        return min(bisect.bisect_right(self._ends, point), len(self.proportions) - 1)

    @functools.cached_property
    def _start(self) -> int:
        return int(KeyedRandom("mixing", self.seed).words(1)[0])

    @functools.cached_property
    def _ends(self) -> list[int]:
        """Upper ends of the streams' shares, in parts of `_TURN`."""
        total = math.fsum(self.proportions)
        return [int(end / total * _TURN) for end in itertools.accumulate(self.proportions)]


class Segment(NamedTuple):
    """Samples `start` to `stop` (None: all there are) of shard number `shard`."""

    shard: int
    start: int
    stop: int | None


@dataclass(frozen=True, eq=False)  # hashed by identity: the tables below are cached for each
class Order:
    """The segments of every lane.

    weights: of each shard, for drawing with replacement; None: every sample of an epoch once.
    counts: samples of each shard; None where unknown: then whole shards take the place of samples.
    salt: tells the orders of a mixture's sources apart.
    """

    seed: int
    num_lanes: int
    num_shards: int
    weights: tuple[float, ...] | None = None
    counts: tuple[int, ...] | None = None
    salt: tuple[int, ...] = ()

    def segment(self, lane: int, epoch: int, number: int) -> Segment | None:
        """The lane's segment `number` in `epoch`; None when its epoch ends before. Drawing never ends."""
        if self.weights is not None:
            return self._drawn(lane, number)
        table = _table(self, epoch)
        start, stop = lane_range(int(table.ends[-1]), self.num_lanes, lane, epoch)
        position = int(np.searchsorted(table.ends, start, side="right")) + number
        begin = int(table.ends[position - 1]) if position else 0
        if begin >= stop or start >= stop:
            return None
        shard = int(table.shards[position])
        if self.counts is None:
            return Segment(shard, 0, None)
        return Segment(shard, max(start, begin) - begin, min(stop, int(table.ends[position])) - begin)

    def _drawn(self, lane: int, number: int) -> Segment:
        random = KeyedRandom("draw", self.seed, lane, number, *self.salt)
        shard = int(np.searchsorted(_cumulative(self), random.uniform(), side="right"))
        start = 0
        if number == 0 and self.counts is not None and self.num_shards < 4 * self.num_lanes:
            # Many lanes on few shards, all from their first samples on, would fill batches with repetitions.
            start = int(random.uniform() * self.counts[shard])
        return Segment(shard, start, None)


class _Table(NamedTuple):
    shards: np.ndarray  # int64 [n], a permutation of the shards that hold anything
    ends: np.ndarray  # int64 [n], samples up to and with each


@functools.lru_cache(maxsize=4)
def _table(order: Order, epoch: int) -> _Table:
    shards = KeyedRandom("shards", order.seed, epoch, *order.salt).permutation(order.num_shards)
    counts = np.ones(order.num_shards, np.int64) if order.counts is None else np.asarray(order.counts, np.int64)
    shards = shards[counts[shards] > 0]
    return _Table(shards, np.cumsum(counts[shards]))


@functools.lru_cache(maxsize=4)
def _cumulative(order: Order) -> np.ndarray:
    """Upper ends of the shards' shares of [0, 1); shards known to be empty have none."""
    weights = np.asarray(order.weights, np.float64)
    if order.counts is not None:
        weights = np.where(np.asarray(order.counts) > 0, weights, 0.0)
    return np.cumsum(weights) / math.fsum(weights)


def lane_range(num_samples: int, num_lanes: int, lane: int, epoch: int) -> tuple[int, int]:
    """The lane's part [start, stop) of an epoch of `num_samples`.

    The parts rotate with the epochs, so that over as many epochs as there are lanes each lane has had every part:
    all get the same where they do not divide, and none is left without samples when there are fewer samples than
    lanes, or when a filter keeps but a few.
    """
    base, extra = divmod(num_samples, num_lanes)
    cycles = math.gcd(num_lanes, extra)
    cycle = num_lanes // cycles  # epochs after which steps of `extra` come back to the same part
    turn = (lane - epoch * extra - epoch // cycle % cycles) % num_lanes
    start = turn * base + min(turn, extra)
    return start, start + base + (turn < extra)


def block_bytes(budget_mib: int, lanes: int, workers: int, streams: int = 1) -> int:
    """Raw bytes that a stream collects and shuffles at a time, of the `lanes` of a rank with `streams` each.

    A worker holds, of each of its streams, one block being used, one being read and what storage fetched
    ahead (`read_ahead_bytes`): 3/8, 3/8 and 2/8 of the stream's share of the worker's budget.
    """
    lanes_per_worker = math.ceil(lanes / max(1, min(workers, lanes)))
    return max(1 << 16, (budget_mib << 20) // (lanes_per_worker * streams) * 3 // 8)


def block_samples(number: int) -> int:
    """The most samples in a lane's block `number`, whatever their bytes.

    The first blocks are small, so that the first batch does not wait for all lanes to fill theirs; the limit
    keeps sets of small samples from being read over and over before anything of them is used.
    """
    return min(_FIRST_BLOCK << min(number, 16), _MAX_BLOCK)


def read_ahead_bytes(block: int) -> int:
    """Size of a ranged read for blocks of `block` bytes; two are held a lane."""
    return min(max(block // 3, 1 << 18), 8 << 20)
