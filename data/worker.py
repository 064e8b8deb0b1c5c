"""The work of one loader process: raw samples of its lanes into its rows of each batch. Knows no processes.

Every worker computes the schedule of all the rank's lanes and fills the rows of its own, so workers need
not talk to each other and their number leaves no trace in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from data.background import DaemonPool
from data.batch import LaneCursor
from data.config import LoaderConfig
from data.errors import DataConfigError, DataError
from data.handoff import Pixels, Sender
from data.lanes import Lane, LaneReader
from data.order import Order, deal, read_ahead_bytes, schedule_rows
from data.prepare import Prepared, Preparer
from data.readers import build_reader
from data.samples import RawSample, SampleError, SampleId
from data.stats import LoaderStats, check_skip_fraction
from data.urls import mask_url

_READ_THREADS = 8
_CHECK_EVERY = 100  # samples in a row that cannot be used
_BARREN_LIMIT = 10_000

Tokenize = Callable[[list[str]], torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """What every worker of a rank needs: `cursors` of all the rank's lanes, in ascending order of the lanes."""

    config: LoaderConfig
    tokenize: Tokenize
    num_lanes: int  # of the whole run
    block_bytes: int
    cursors: Mapping[int, LaneCursor]


@dataclass
class Part:
    """A worker's rows of one batch, with what was read for them and where its lanes then stood."""

    rows: np.ndarray  # int64 [k], rows of the batch
    images: Pixels  # uint8 [k, 3, H, W]
    tokens: np.ndarray  # int64 [k, L]
    draws: dict[str, np.ndarray]  # each [k, ...]
    keys: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    cursors: dict[int, LaneCursor] = field(default_factory=dict)
    stats: LoaderStats = field(default_factory=LoaderStats)


def order_of(config: LoaderConfig, num_lanes: int) -> Order:
    """The run's order. Shards are weighted by their source's factor where they are drawn with replacement."""
    weights = tuple(config.sources[source].factor for source in config.shard_sources) if config.resampled else None
    return Order(config.seed, num_lanes, len(config.urls), weights, config.sizes)


class Worker:
    """Worker number `index` of `count` of a rank; `parts` yields one part a batch, for ever.

    num_slots: parts whose pixels are kept; the one after them overwrites the first.
    """

    def __init__(self, plan: Plan, index: int = 0, count: int = 1, share_memory: bool = False, num_slots: int = 1):
        config = plan.config
        self._config = config
        self._tokenize = plan.tokenize
        self._pixels = Sender(config.image_size, num_slots, share_memory)
        self._preparer = Preparer(config)
        self._urls = config.urls
        self._shard_sources = config.shard_sources
        self._taken = np.array([cursor.taken for cursor in plan.cursors.values()], dtype=np.int64)
        self._mine = deal(range(len(plan.cursors)), count, index)
        self._lanes = self._open_lanes(plan, list(plan.cursors.items()))
        self._new = LoaderStats()  # since the last part
        self._all = LoaderStats()
        self._num_barren = 0

    def _open_lanes(self, plan: Plan, cursors: Sequence[tuple[int, LaneCursor]]) -> dict[int, tuple[int, Lane]]:
        """For each of this worker's places among the rank's lanes: the lane's number and the lane."""
        reader = build_reader(plan.config, read_ahead_bytes(plan.block_bytes))
        order = order_of(plan.config, plan.num_lanes)
        pool = DaemonPool(min(_READ_THREADS, max(1, len(self._mine))), "read")
        lanes = {}
        for place in self._mine:
            number, cursor = cursors[place]
            blocks = LaneReader(order, reader, self._urls, number, cursor, plan.block_bytes)
            lanes[place] = number, Lane(blocks, cursor, pool)
        return lanes

    def parts(self) -> Iterator[Part]:
        """This worker's part of every batch, in the order of the batches."""
        while True:
            schedule = schedule_rows(self._taken, self._config.batch_size)
            self._taken += np.bincount(schedule, minlength=len(self._taken))
            rows = np.flatnonzero(np.isin(schedule, self._mine))
            yield self._part(rows, [self._lanes[place][1] for place in schedule[rows]])

    def _part(self, rows: np.ndarray, lanes: Sequence[Lane]) -> Part:
        pixels, images = self._pixels.take(len(rows))
        part = Part(rows, pixels, np.zeros((len(rows), 0), np.int64), {})
        captions: list[str] = []
        draws: list[dict[str, torch.Tensor]] = []
        for row, lane in enumerate(lanes):
            raw, prepared = self._next_good(lane)
            images[row] = prepared.image.numpy()
            captions.append(prepared.caption)
            draws.append(prepared.draws)
            part.keys.append(raw.key)
            part.shards.append(raw.shard)
        if captions:
            part.tokens = self._tokenize(captions).numpy()
            part.draws = {name: torch.stack([draw[name] for draw in draws]).numpy() for name in draws[0]}
        part.cursors = {number: lane.cursor for number, lane in self._lanes.values()}
        part.stats, self._new = self._new, LoaderStats()
        self._all.add(part.stats)
        return part

    def _next_good(self, lane: Lane) -> tuple[RawSample, Prepared]:
        """The lane's next sample that can be used; those that cannot are counted on the way."""
        while True:
            sample_id, raw, shard, begun = lane.next_sample()
            if begun is not None:
                self._new.opened_shards += begun.num_opened
                for failure in begun.failures:
                    self._new.fail(failure.kind, f"{failure.url}: {failure.reason}")
            prepared = self._prepare(sample_id, raw)
            if prepared is not None:
                lane.count_row()
                self._num_barren = 0
                self._new.delivered += 1
                self._new.source_samples[self._config.sources[self._shard_sources[shard]].name] += 1
                return raw, prepared

    def _prepare(self, sample_id: SampleId, raw: RawSample) -> Prepared | None:
        try:
            return self._preparer.prepare(raw, (self._config.seed, *sample_id))
        except SampleError as error:
            self._lose(error.reason, raw, str(error))
        except Exception as error:  # decoders fail in more ways than they document; a bug shows in the counts
            self._lose(type(error).__name__, raw, f"{type(error).__name__}: {error}")
        return None

    def _lose(self, reason: str, raw: RawSample, detail: str) -> None:
        example = f"{raw.key} in {mask_url(raw.shard)} ({detail})"
        self._new.skip(reason, example)
        self._num_barren += 1
        if self._num_barren % _CHECK_EVERY == 0:
            self._check_barren(example)

    def _check_barren(self, example: str) -> None:
        """The parent judges the rank's counts at each batch; here, what would keep a batch from ever being full."""
        seen = LoaderStats()
        seen.add(self._all)
        seen.add(self._new)
        if not seen.delivered or self._num_barren >= _BARREN_LIMIT:
            check_skip_fraction(seen, self._config.max_skip_fraction)
        if self._num_barren >= _BARREN_LIMIT:
            raise DataError(f"{self._num_barren} samples in a row cannot be used; the last: {example}")


def run_worker(worker: Worker) -> Iterator[Part | DataError]:
    """The worker's parts; a DataError becomes the last item, so that it crosses processes as it is."""
    parts = worker.parts()
    while True:
        try:
            item: Any = next(parts)
        except DataError as error:
            # With its message alone: subclasses with more arguments do not survive pickling.
            yield (DataConfigError if isinstance(error, DataConfigError) else DataError)(str(error))
            return
        yield item
