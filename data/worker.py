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
from data.config import LoaderConfig
from data.cursors import LaneCursor
from data.errors import DataConfigError, DataError
from data.handoff import Pixels, Sender
from data.lanes import Block, Lane, MixedLane
from data.order import deal, schedule_rows, streams_of
from data.prepare import Prepared, Preparer
from data.samples import RawSample, SampleError, SampleId
from data.stats import LoaderStats, check_skip_fraction
from data.strands import LaneOpener
from data.urls import mask_url
from data.worker_status import Doing, Note

_READ_THREADS = 8
_CHECK_EVERY = 100  # samples in a row that cannot be used
_BARREN_LIMIT = 10_000
_NOTE_S = 1.0  # between notes of what is being read

Tokenize = Callable[[list[str]], torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """What every worker of a rank needs: `cursors` by stream of all the rank's lanes, in ascending order."""

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


class Worker:
    """Worker number `index` of `count` of a rank; `parts` yields one part a batch, for ever.

    num_slots: parts whose pixels are kept; the one after them overwrites the first. note: where it says what it is at.
    """

    def __init__(
        self,
        plan: Plan,
        index: int = 0,
        count: int = 1,
        share_memory: bool = False,
        num_slots: int = 1,
        note: Note | None = None,
    ):
        config = plan.config
        self._config = config
        self._note = note or Note()
        self._tokenize = plan.tokenize
        self._pixels = Sender(config.image_size, num_slots, share_memory)
        self._preparer = Preparer(config)
        self._shard_sources = config.shard_sources
        streams = config.streams_per_lane
        taken = np.array([cursor.taken for cursor in plan.cursors.values()], dtype=np.int64)
        self._taken = taken.reshape(-1, streams).sum(axis=1)  # by the rank's lanes
        self._mine = deal(range(len(self._taken)), count, index)
        self._lanes = self._open_lanes(plan, [stream // streams for stream in plan.cursors][::streams])
        self._new = LoaderStats()  # since the last part
        self._all = LoaderStats()
        self._num_barren = 0

    def _open_lanes(self, plan: Plan, numbers: Sequence[int]) -> dict[int, tuple[int, Lane | MixedLane]]:
        """For each of this worker's places among the rank's lanes `numbers`: the lane's number and the lane."""
        pool = DaemonPool(min(_READ_THREADS, max(1, len(self._mine) * plan.config.streams_per_lane)), "read")
        opener = LaneOpener(plan.config, plan.num_lanes, plan.block_bytes, pool)
        return {place: (numbers[place], opener.open(numbers[place], plan.cursors)) for place in self._mine}

    def parts(self) -> Iterator[Part]:
        """This worker's part of every batch, in the order of the batches."""
        while True:
            schedule = schedule_rows(self._taken, self._config.batch_size)
            self._taken += np.bincount(schedule, minlength=len(self._taken))
            rows = np.flatnonzero(np.isin(schedule, self._mine))
            yield self._part(rows, [self._lanes[place][1] for place in schedule[rows]])

    def _part(self, rows: np.ndarray, lanes: Sequence[Lane | MixedLane]) -> Part:
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
        part.cursors = self._cursors()
        part.stats, self._new = self._new, LoaderStats()
        self._all.add(part.stats)
        if part.keys:
            self._note.write(Doing.AHEAD, part.shards[-1], part.keys[-1])
        return part

    def _cursors(self) -> dict[int, LaneCursor]:
        cursors: dict[int, LaneCursor] = {}
        for number, lane in self._lanes.values():
            ours = lane.cursors
            cursors |= zip(streams_of(number, len(ours)), ours, strict=True)
        return cursors

    def _next_good(self, lane: Lane | MixedLane) -> tuple[RawSample, Prepared]:
        """The lane's next sample that can be used; those that cannot are counted on the way."""
        while True:
            while not lane.wait(_NOTE_S):
                self._note.write(Doing.READING, *lane.reading)
            sample_id, raw, shard, begun = lane.next_sample()
            self._note.write(Doing.PREPARING, raw.shard, raw.key)
            if begun is not None:
                self._count_block(begun)
            source = self._source_of(shard)
            prepared = self._prepare(sample_id, raw, source)
            if prepared is not None:
                lane.count_row()
                self._num_barren = 0
                self._new.deliver(source)
                return raw, prepared

    def _source_of(self, shard: int) -> str:
        return self._config.sources[self._shard_sources[shard]].name

    def _count_block(self, block: Block) -> None:
        self._new.opened_shards += block.num_opened
        for failure in block.failures:
            self._new.fail(failure.kind, f"{failure.url}: {failure.reason}")
        for shard, count in block.filtered.items():
            self._new.source_filtered[self._source_of(shard)] += count

    def _prepare(self, sample_id: SampleId, raw: RawSample, source: str) -> Prepared | None:
        try:
            return self._preparer.prepare(raw, (self._config.seed, *sample_id))
        except SampleError as error:
            self._lose(error.reason, raw, source, str(error))
        except Exception as error:  # decoders fail in more ways than they document; a bug shows in the counts
            self._lose(type(error).__name__, raw, source, f"{type(error).__name__}: {error}")
        return None

    def _lose(self, reason: str, raw: RawSample, source: str, detail: str) -> None:
        example = f"{raw.key} in {mask_url(raw.shard)} ({detail})"
        self._new.skip(reason, example, source)
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
