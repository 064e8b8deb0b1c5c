"""What the lanes of a run read: all sources in one order, or in a mixture each source in an order of its own.

From a loader's configuration to open lanes. Knows no batches, ranks or workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from data.background import DaemonPool
from data.config import LoaderConfig
from data.cursors import LaneCursor
from data.lanes import Lane, LaneReader, MixedLane
from data.order import Mixing, Order, read_ahead_bytes, streams_of
from data.readers import build_reader
from data.where import Filter, Where


@dataclass(frozen=True)
class Strand:
    """What one stream of every lane reads: `urls` in `order`, the first of them being shard number `first` of all."""

    order: Order
    urls: tuple[str, ...]
    first: int = 0


def strands_of(config: LoaderConfig, num_lanes: int) -> list[Strand]:
    """One strand over all sources, or in a mixture one for each source; `num_lanes` of the whole run.

    Where shards are drawn with replacement, they are weighted by their source's factor.
    """
    if not config.proportions:
        weights = tuple(config.sources[source].factor for source in config.shard_sources) if config.resampled else None
        return [Strand(Order(config.seed, num_lanes, len(config.urls), weights, config.sizes), config.urls)]
    strands, first = [], 0
    for number, source in enumerate(config.sources):
        count = len(source.urls)
        weights = (1.0,) * count if config.resampled else None
        counts = None if config.sizes is None else config.sizes[first : first + count]
        strands.append(Strand(Order(config.seed, num_lanes, count, weights, counts, (number,)), source.urls, first))
        first += count
    return strands


class LaneOpener:
    """Opens lanes of a run; `pool` reads their blocks ahead. `num_lanes` and `block_bytes` are the run's."""

    def __init__(self, config: LoaderConfig, num_lanes: int, block_bytes: int, pool: DaemonPool):
        self._config = config
        self._block_bytes = block_bytes
        self._pool = pool
        self._strands = strands_of(config, num_lanes)
        self._reader = build_reader(config, read_ahead_bytes(block_bytes))
        self._keeps = None if config.where is None else Filter(Where.parse(config.where)).keeps

    def open(self, lane: int, cursors: Mapping[int, LaneCursor]) -> Lane | MixedLane:
        """Lane number `lane`, going on at the `cursors` of its streams."""
        numbers = streams_of(lane, len(self._strands))
        streams = [
            self._open_stream(strand, lane, number, cursors[number])
            for strand, number in zip(self._strands, numbers, strict=True)
        ]
        if not self._config.proportions:
            return streams[0]
        return MixedLane(lane, streams, Mixing(self._config.seed, self._config.proportions))

    def _open_stream(self, strand: Strand, lane: int, stream: int, cursor: LaneCursor) -> Lane:
        reader = LaneReader(
            strand.order,
            self._reader,
            strand.urls,
            lane,
            cursor,
            self._block_bytes,
            stream=stream,
            first_shard=strand.first,
            keeps=self._keeps,
        )
        return Lane(reader, cursor, self._pool)
