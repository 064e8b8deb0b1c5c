"""One way to read a shard's samples, whatever kind of shard it is. Knows no lanes and no order of shards."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Protocol

from data.config import LoaderConfig
from data.errors import DataConfigError, TarError
from data.samples import RawSample
from data.shard_index import Entry, Indexes
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
        self._indexes = Indexes()

    def read(self, url: str, start: int = 0, stop: int | None = None, offset: int = -1) -> Iterator[RawSample]:
        """See `ShardReader.read`. `offset`, where known, is the byte of sample `start`: what precedes is not read.

        Where it is not known, an index beside the shard may know a byte near it.
        """
        if offset >= 0:
            return self._read(url, start, stop, start, offset)
        entry = self._indexes.before(url, start) if start else None
        return self._read(url, start, stop) if entry is None else self._read_indexed(url, start, stop, entry)

    def _read(
        self, url: str, start: int, stop: int | None, first: int = 0, offset: int = 0
    ) -> Generator[RawSample, None, None]:
        """From byte `offset` on, at which sample number `first` begins."""
        with open_stream(
            url, offset=offset, retry=self._retry, chunk_bytes=self._chunk_bytes, read_ahead=self._read_ahead
        ) as stream:
            yield from read_samples(stream, url, start, stop, first=first)

    def _read_indexed(self, url: str, start: int, stop: int | None, entry: Entry) -> Iterator[RawSample]:
        """From `entry` on, unless another sample is there than the index says: then the index is of another shard."""
        with closing(self._read(url, entry.number, stop, entry.number, entry.offset)) as samples:
            first = _first_of(samples)
            if first is not None and first.key == entry.key:
                yield from (raw for raw in itertools.chain([first], samples) if raw.index >= start)
                return
        yield from self._read(url, start, stop)


def _first_of(samples: Iterator[RawSample]) -> RawSample | None:
    """The first sample; None where there is none, or no tar."""
    try:
        return next(samples, None)
    except TarError:
        return None


def read_from(reader: ShardReader, url: str, start: int, stop: int | None, offset: int) -> Iterator[RawSample]:
    """`reader.read`, from the byte `offset` on where it is known."""
    if offset >= 0 and isinstance(reader, TarReader):
        return reader.read(url, start, stop, offset)
    return reader.read(url, start, stop)


def with_shards(config: LoaderConfig) -> LoaderConfig:
    """`config` with lists, folders and synthetic sets cut into the virtual shards that their readers understand."""
    if config.dataset_type == "csv" and not _is_cut(config):
        from data.table import table_shards

        sources, sizes = table_shards(config.sources, config)
        return dataclasses.replace(config, sources=sources, sizes=sizes)
    if config.dataset_type == "folder" and not _is_cut(config):
        from data.folder_source import folder_shards

        sources, sizes = folder_shards(config.sources)
        return dataclasses.replace(config, sources=sources, sizes=sizes)
    if config.dataset_type == "synthetic" and not config.sources:
        from data.synthetic import synthetic_shards

        source, sizes = synthetic_shards(config.num_samples or 0)
        return dataclasses.replace(config, sources=(source,), sizes=sizes)
    return config


def _is_cut(config: LoaderConfig) -> bool:
    """Whether the sources of a set of lists or folders are virtual shards already."""
    return any("#rows=" in url or "#pictures=" in url for url in config.urls)


def build_reader(
    config: LoaderConfig, chunk_bytes: int = CHUNK_BYTES, read_ahead: int = 1, retry: Retry | None = None
) -> ShardReader:
    """The reader for `config.dataset_type`. DataConfigError for an unknown type."""
    if config.dataset_type == "webdataset":
        return TarReader(chunk_bytes, read_ahead, retry or config.retry)
    if config.dataset_type == "csv":
        from data.table import TableReader

        return TableReader(config, _record_fields(config))
    if config.dataset_type == "folder":
        from data.folder_source import FolderReader

        return FolderReader(_members_of(config))
    if config.dataset_type == "synthetic":
        from data.synthetic import SyntheticReader

        return SyntheticReader(config.image_size)
    raise DataConfigError(f"--dataset-type {config.dataset_type}: known are webdataset, csv, folder, synthetic")


def _record_fields(config: LoaderConfig) -> set[str]:
    """What captions and the filter read of a sample's record."""
    fields = set(config.captions.json_fields)
    if config.where is None:
        return fields
    from data.where import Where

    return fields | Where.parse(config.where).fields


def _members_of(config: LoaderConfig) -> tuple[str, ...]:
    """The extensions, besides the picture's, that a sample needs."""
    extensions = config.captions.extensions
    return extensions if config.where is None or "json" in extensions else (*extensions, "json")
