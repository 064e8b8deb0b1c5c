"""One lane as a stream of raw samples: shards opened in the lane's order, shuffled inside blocks of bounded size.

Owns what happens when a shard cannot be read: it is noted and passed over. Samples that a filter does not keep
never enter a block. In a mixture a lane has one stream for each source. Knows no pixels, batches or workers.
Which samples make up a block depends on where it begins alone, so a lane resumes by reading its current block
again; where a failure cut a block short, the cursor says where (`LaneCursor.cuts`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

from data.background import DaemonPool
from data.cursors import LaneCursor
from data.errors import DataConfigError, DataError, ShardError
from data.order import Mixing, Order, Segment, block_samples
from data.randomness import KeyedRandom
from data.readers import ShardReader, read_from
from data.samples import RawSample, SampleId
from data.urls import mask_url

_BARREN_LIMIT = 50  # shards in a row without a sample
_UNREACHABLE_LIMIT = 5  # storage has insisted for a minute on each
_REJECTED_LIMIT = 100_000  # samples in a row that the filter does not keep

Keeps = Callable[[RawSample], bool]


@dataclass(frozen=True)
class ShardFailure:
    """A shard, or the rest of it, that was passed over. `kind` as in `ShardError`."""

    url: str
    kind: str
    reason: str


@dataclass
class Block:
    """Samples that are shuffled together, in the order in which they leave. A sample is None once it has left."""

    begin: LaneCursor
    ids: list[SampleId] = field(default_factory=list)
    samples: list[RawSample | None] = field(default_factory=list)
    shards: list[int] = field(default_factory=list)  # their numbers
    failures: list[ShardFailure] = field(default_factory=list)
    filtered: Counter[int] = field(default_factory=Counter)  # samples not kept, by shard number
    num_opened: int = 0  # shards

    def permute(self, order: Sequence[int]) -> None:
        """Puts the samples into `order`."""
        self.ids = [self.ids[i] for i in order]
        self.samples = [self.samples[i] for i in order]
        self.shards = [self.shards[i] for i in order]


class LaneReader:
    """Reads the blocks of a lane, or of one stream of it, from `cursor` on, one call of `read_block` at a time.

    urls: the shards of `order`, of which the first is shard number `first_shard` among those of all sources.
    keeps: whether a sample takes part at all; must depend on the sample alone.
    """

    def __init__(
        self,
        order: Order,
        reader: ShardReader,
        urls: Sequence[str],
        lane: int,
        cursor: LaneCursor,
        block_bytes: int,
        *,
        stream: int | None = None,
        first_shard: int = 0,
        keeps: Keeps | None = None,
    ):
        self._stream = lane if stream is None else stream
        self._first_shard = first_shard
        self._keeps = keeps
        self._num_rejected = 0  # in a row
        self._order = order
        self._reader = reader
        self._urls = urls
        self._lane = lane
        self._block_bytes = block_bytes
        self._epoch = cursor.epoch
        self._number = cursor.segment  # of the segment
        self._sample = cursor.sample  # that comes next, counted in the shard
        self._offset = cursor.offset
        self._block = cursor.block
        self._cuts = dict(cursor.cuts)
        self._segment: Segment | None = None
        self._samples: Iterator[RawSample] | None = None
        self._num_barren = 0
        self._is_barren = True  # nothing came of the current segment so far

    def read_block(self) -> Block:
        """The next block; it holds at least one sample and ends with the epoch at the latest.

        Raises DataError after many shards in a row without a single sample.
        """
        block = Block(LaneCursor(block=self._block, cuts=tuple(self._cuts.items())))
        num_bytes, most_samples = 0, block_samples(self._block)
        while num_bytes < self._block_bytes and len(block.samples) < most_samples:
            raw = self._next_sample(block)
            if raw is None:
                self._epoch, self._number, self._sample = self._epoch + 1, 0, 0
                if block.samples:
                    break
                # Cuts name segments of the epoch that has just ended.
                self._cuts = {}
                block.begin = block.begin._replace(cuts=())
                continue
            self._put(block, raw)
            num_bytes += raw.num_bytes
        self._block += 1
        self._cuts = {}
        key = (self._order.seed, self._lane, block.begin.epoch, block.begin.block, *self._order.salt)
        block.permute(KeyedRandom("block", *key).permutation(len(block.samples)).tolist())
        return block

    @property
    def reading(self) -> tuple[str, str]:
        """Shard and sample that are read at the moment, as well as another thread can tell."""
        segment = self._segment
        return ("", "") if segment is None else (self._urls[segment.shard], f"number {self._sample}")

    def _put(self, block: Block, raw: RawSample) -> None:
        assert self._segment is not None
        if not block.samples:
            block.begin = block.begin._replace(
                epoch=self._epoch, segment=self._number, sample=raw.index, offset=raw.offset
            )
        block.ids.append(SampleId(self._stream, self._epoch, self._number, raw.index))
        block.samples.append(raw)
        block.shards.append(self._first_shard + self._segment.shard)

    def _next_sample(self, block: Block) -> RawSample | None:
        """The lane's next sample, beyond whatever shards fail; None at the end of its epoch."""
        while True:
            if self._samples is None and not self._open(block):
                return None
            if self._samples is None:
                continue
            try:
                raw = next(self._samples, None)
            except DataConfigError:
                raise
            except ShardError as error:
                self._fail(block, error.kind, error.reason)
            except Exception as error:  # a shard that no reader foresaw costs the shard, not the run
                self._fail(block, "unreadable", f"{type(error).__name__}: {error}")
            else:
                if raw is not None:
                    self._sample = raw.index + 1
                    self._is_barren, self._num_barren = False, 0
                    if self._is_kept(block, raw):
                        return raw
                else:
                    self._end_segment(block)

    def _is_kept(self, block: Block, raw: RawSample) -> bool:
        assert self._segment is not None
        if self._keeps is None or self._keeps(raw):
            self._num_rejected = 0
            if "json" in raw.fields:
                raw.record = None  # many times the text it came from; a block holds hundreds
            return True
        block.filtered[self._first_shard + self._segment.shard] += 1
        self._num_rejected += 1
        if self._num_rejected >= _REJECTED_LIMIT:
            raise DataError(f"--where keeps none of {self._num_rejected} samples in a row, the last in {raw.shard}")
        return False

    def _open(self, block: Block) -> bool:
        """Begins to read the current segment, unless a cut leaves nothing of it; False at the end of the epoch."""
        segment = self._order.segment(self._lane, self._epoch, self._number)
        if segment is None:
            return False
        start = max(self._sample, segment.start)
        stop = self._cuts.get(self._number, segment.stop)
        if stop is not None and start >= stop:
            self._to_next_segment()
            return True
        self._segment, self._sample, self._is_barren = segment, start, True
        self._samples = read_from(self._reader, self._urls[segment.shard], start, stop, self._offset)
        self._offset = -1
        block.num_opened += 1
        return True

    def _end_segment(self, block: Block) -> None:
        """The reader has no more: as it should be, or fewer than were counted, or none at all."""
        assert self._segment is not None
        stop = self._segment.stop
        if self._number in self._cuts:
            self._to_next_segment()
        elif stop is not None and self._sample < stop:
            self._fail(block, "short", f"ends after {self._sample} samples; {stop} or more were counted")
        elif self._is_barren and self._sample == 0:
            self._fail(block, "empty", "holds no sample")
        else:
            self._to_next_segment()

    def _fail(self, block: Block, kind: str, reason: str) -> None:
        assert self._segment is not None
        failure = ShardFailure(mask_url(self._urls[self._segment.shard]), kind, reason)
        block.failures.append(failure)
        if block.samples:
            block.begin = block.begin._replace(cuts=(*block.begin.cuts, (self._number, self._sample)))
        self._num_barren += self._is_barren
        if self._num_barren >= (_UNREACHABLE_LIMIT if kind == "unreachable" else _BARREN_LIMIT):
            first = next(one for one in block.failures[-self._num_barren :])
            raise DataError(
                f"{self._num_barren} shards in a row could not be read; {first.url}: {first.reason} ({first.kind})"
            )
        self._to_next_segment()

    def _to_next_segment(self) -> None:
        self._number, self._sample = self._number + 1, 0
        self._segment, self._samples = None, None


class Lane:
    """Hands out the raw samples of a stream; the next block is read in the background while one is used."""

    def __init__(self, reader: LaneReader, cursor: LaneCursor, pool: DaemonPool):
        self._reader = reader
        self._pool = pool
        self._ahead: Future[Block] = pool.submit(reader.read_block)
        self._block: Block | None = None
        self._emitted = 0
        self._resumed = cursor.emitted
        self._cursor = cursor

    def next_sample(self) -> tuple[SampleId, RawSample, int, Block | None]:
        """A raw sample, its shard's number, and the block if it is the first one taken of it."""
        begun = None
        while self._block is None or self._emitted >= len(self._block.samples):
            begun = self._begin_block()
        block, position = self._block, self._emitted
        raw = block.samples[position]
        assert raw is not None
        block.samples[position] = None
        self._emitted += 1
        self._cursor = block.begin._replace(emitted=self._emitted, taken=self._cursor.taken)
        return block.ids[position], raw, block.shards[position], begun

    def wait(self, timeout_s: float) -> bool:
        """True when there is a sample to be had; False when `timeout_s` were not enough to read it."""
        has_sample = self._block is not None and self._emitted < len(self._block.samples)
        return has_sample or bool(wait([self._ahead], timeout_s).done)

    @property
    def reading(self) -> tuple[str, str]:
        """Shard and sample that are read ahead at the moment."""
        return self._reader.reading

    def count_row(self) -> None:
        """Notes that the sample last handed out became a row of a batch."""
        self._cursor = self._cursor._replace(taken=self._cursor.taken + 1)

    @property
    def cursor(self) -> LaneCursor:
        """Where the lane goes on, as of what was handed out."""
        return self._cursor

    @property
    def cursors(self) -> list[LaneCursor]:
        """The cursors of the lane's streams: its only one's."""
        return [self._cursor]

    def _begin_block(self) -> Block:
        self._block = self._ahead.result()
        self._ahead = self._pool.submit(self._reader.read_block)
        self._emitted, self._resumed = min(self._resumed, len(self._block.samples)), 0
        self._block.samples[: self._emitted] = [None] * self._emitted
        return self._block


class MixedLane:
    """Lane number `lane` of a mixture: one `Lane` for each source, of which the one whose turn it is gives the next.

    A sample that turns out unusable is replaced by the next of the same source, so the rows keep the proportions.
    """

    def __init__(self, lane: int, streams: Sequence[Lane], mixing: Mixing):
        self._lane = lane
        self._streams = streams
        self._mixing = mixing
        self._row = sum(stream.cursor.taken for stream in streams)

    def next_sample(self) -> tuple[SampleId, RawSample, int, Block | None]:
        """As `Lane.next_sample`, of the source whose turn it is."""
        return self._current.next_sample()

    def wait(self, timeout_s: float) -> bool:
        """As `Lane.wait`, of the source whose turn it is."""
        return self._current.wait(timeout_s)

    @property
    def reading(self) -> tuple[str, str]:
        """As `Lane.reading`, of the source whose turn it is."""
        return self._current.reading

    def count_row(self) -> None:
        """Notes that the sample last handed out became a row of a batch: the turn passes on."""
        self._current.count_row()
        self._row += 1

    @property
    def cursors(self) -> list[LaneCursor]:
        """The cursors of the lane's streams, in the order of the sources."""
        return [stream.cursor for stream in self._streams]

    @property
    def _current(self) -> Lane:
        return self._streams[self._mixing.stream(self._lane, self._row)]
