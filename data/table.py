"""Lists of pictures as shards, whichever format each of them has: CSV, TSV or Parquet. Knows no lanes."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from urllib.parse import urlsplit

from data.csv_source import CsvReader, cut_csv
from data.errors import ShardError
from data.parquet_source import ParquetReader, cut_parquet
from data.rows import CsvFields, RowRange
from data.samples import RawSample
from data.urls import Source, mask_url


def table_shards(
    sources: tuple[Source, ...], config: CsvFields, rows_per_shard: int | None = None
) -> tuple[tuple[Source, ...], tuple[int, ...]]:
    """The sources with virtual shards in place of lists, and the rows in each shard, over all sources in order.

    Raises DataConfigError when a list cannot be read, has no rows or lacks a column.
    """
    cut, counts = [], []
    for source in sources:
        ranges = [rows for url in source.urls for rows in _cut(url, config, rows_per_shard)]
        cut.append(replace(source, urls=tuple(rows.shard for rows in ranges)))
        counts += [rows.stop - rows.first for rows in ranges]
    return tuple(cut), tuple(counts)


class TableReader:
    """Reads virtual shards of lists. A picture that cannot be had gives a sample without one, counted as "no_image".

    fields: what captions and filters read of a row besides its two columns; it becomes the sample's record.
    """

    def __init__(self, config: CsvFields, fields: Iterable[str] = ()):
        self._csv = CsvReader(config, fields)
        self._parquet = ParquetReader(config, fields)

    def read(self, url: str, start: int = 0, stop: int | None = None) -> Iterator[RawSample]:
        """Samples `start` to `stop` of a virtual shard, in order, the caption under `txt`.

        Raises ShardError when the list cannot be read; a picture that cannot is left out of its sample.
        """
        rows = RowRange.of(url)
        count = rows.stop - rows.first
        reader = self._parquet if _is_parquet(rows.url) else self._csv
        try:
            with closing(reader.read(rows, start, count if stop is None else min(stop, count))) as samples:
                yield from samples
        except csv.Error as error:
            raise ShardError(mask_url(rows.url), f"broken CSV ({error})", "corrupt") from error


def _cut(url: str, config: CsvFields, rows_per_shard: int | None) -> list[RowRange]:
    cut = cut_parquet if _is_parquet(url) else cut_csv
    return cut(url, config) if rows_per_shard is None else cut(url, config, rows_per_shard)


def _is_parquet(url: str) -> bool:
    path = urlsplit(url).path if "://" in url else url
    return path.lower().endswith((".parquet", ".pq"))
