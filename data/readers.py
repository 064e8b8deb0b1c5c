"""One way to read a shard's samples, whatever kind of shard it is. Knows no lanes and no order of shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

from data.config import LoaderConfig
from data.errors import DataConfigError
from data.samples import RawSample
from data.storage import CHUNK_BYTES, Retry, open_stream
from data.tar import read_samples


class ShardReader(Protocol):
    """Reads shards, by number of the sample in the shard. Samples carry an `offset` if the reader can start there."""

    def read(self, url: str, start: int = 0, stop: int | None = None) -> Iterator[RawSample]:
        """Samples `start` to `stop` (None: to the end), in order. Raises ShardError, also in the middle."""


class TarReader:
    """Reads tar shards through `data.storage`."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES, read_ahead: int = 2, retry: Retry | None = None):
        self._chunk_bytes = chunk_bytes
        self._read_ahead = read_ahead
        self._retry = retry

    def read(self, url: str, start: int = 0, stop: int | None = None, offset: int = -1) -> Iterator[RawSample]:
        """See `ShardReader.read`. `offset`, where known, is the byte of sample `start`: what precedes is not read."""
        first = start if offset >= 0 else 0
        with open_stream(
            url, offset=max(0, offset), retry=self._retry, chunk_bytes=self._chunk_bytes, read_ahead=self._read_ahead
        ) as stream:
            yield from read_samples(stream, url, start, stop, first=first)


def read_from(reader: ShardReader, url: str, start: int, stop: int | None, offset: int) -> Iterator[RawSample]:
    """`reader.read`, from the byte `offset` on where it is known."""
    if offset >= 0 and isinstance(reader, TarReader):
        return reader.read(url, start, stop, offset)
    return reader.read(url, start, stop)


def with_shards(config: LoaderConfig) -> LoaderConfig:
    """`config` with lists and synthetic sets cut into the virtual shards that their readers understand."""
    if config.dataset_type == "csv" and not _is_cut(config):
        from data.csv_source import csv_shards

        sources, sizes = csv_shards(config.sources, config)
        return dataclasses.replace(config, sources=sources, sizes=sizes)
    if config.dataset_type == "synthetic" and not config.sources:
        from data.synthetic import synthetic_shards

        source, sizes = synthetic_shards(config.num_samples or 0)
        return dataclasses.replace(config, sources=(source,), sizes=sizes)
    return config


def _is_cut(config: LoaderConfig) -> bool:
    """Whether the sources of a CSV set are virtual shards already."""
    return any("#rows=" in url for url in config.urls)


def build_reader(
    config: LoaderConfig, chunk_bytes: int = CHUNK_BYTES, read_ahead: int = 1, retry: Retry | None = None
) -> ShardReader:
    """The reader for `config.dataset_type`. DataConfigError for an unknown type."""
    if config.dataset_type == "webdataset":
        return TarReader(chunk_bytes, read_ahead, retry or config.retry)
    if config.dataset_type == "csv":
        from data.csv_source import CsvReader

        return CsvReader(config)
    if config.dataset_type == "synthetic":
        from data.synthetic import SyntheticReader

        return SyntheticReader(config.image_size)
    raise DataConfigError(f"--dataset-type {config.dataset_type}: known are webdataset, csv, synthetic")
