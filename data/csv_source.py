"""CSV and TSV lists of pictures and captions, cut into virtual shards of rows so that they are read like tars.

A virtual shard is "<list>#rows=<first>-<stop>&byte=<offset>": the row range names it, the offset finds it,
and a reader needs nothing else. Knows nothing of lanes or batches.
"""

from __future__ import annotations

import csv
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO, Protocol

from data.errors import DataConfigError, StorageError
from data.files import open_binary, read_file
from data.samples import IMAGE_EXTENSIONS, RawSample
from data.urls import Source, is_local, local_path, mask_url

ROWS_PER_SHARD = 1000

_VIRTUAL = re.compile(r"^(?P<url>.*)#rows=(?P<first>\d+)-(?P<stop>\d+)&byte=(?P<offset>\d+)$", re.DOTALL)


class CsvFields(Protocol):
    """How a list is laid out: `--csv-separator`, `--csv-img-key`, `--csv-caption-key`. `LoaderConfig` is one."""

    @property
    def csv_separator(self) -> str: ...

    @property
    def csv_img_key(self) -> str: ...

    @property
    def csv_caption_key(self) -> str: ...


@dataclass(frozen=True)
class CsvConfig:
    """`CsvFields` on their own, with OpenCLIP's defaults."""

    csv_separator: str = "\t"
    csv_img_key: str = "filepath"
    csv_caption_key: str = "title"


def csv_shards(
    sources: tuple[Source, ...], config: CsvFields, rows_per_shard: int = ROWS_PER_SHARD
) -> tuple[tuple[Source, ...], tuple[int, ...]]:
    """The sources with virtual shards in place of lists, and the rows in each shard, over all sources in order.

    Raises DataConfigError when a list cannot be read, has no rows or lacks a column.
    """
    cut, counts = [], []
    for source in sources:
        shards: list[str] = []
        for url in source.urls:
            for first, rows, offset in _cut_rows(url, config, rows_per_shard):
                shards.append(f"{url}#rows={first}-{first + rows}&byte={offset}")
                counts.append(rows)
        cut.append(replace(source, urls=tuple(shards)))
    return tuple(cut), tuple(counts)


class CsvReader:
    """Reads virtual shards. A picture that cannot be opened gives a sample without one, counted as "no_image"."""

    def __init__(self, config: CsvFields):
        self.config = config
        self._columns: dict[str, tuple[int, int]] = {}

    def read(self, url: str, start: int = 0, stop: int | None = None) -> Iterator[RawSample]:
        """Samples `start` to `stop` of a virtual shard, in order, the caption under `txt`.

        Raises StorageError when the list cannot be read; a picture that cannot is left out of its sample.
        """
        match = _VIRTUAL.match(url)
        assert match is not None, f"not a virtual shard: {url}"
        columns = self._columns_of(match["url"])
        num_rows = int(match["stop"]) - int(match["first"])
        stop = num_rows if stop is None else min(stop, num_rows)
        with open_binary(match["url"], int(match["offset"])) as file:
            records = _records(file, self.config.csv_separator, int(match["offset"]))
            for index, (_, row) in enumerate(itertools.islice(records, stop)):
                if index >= start:
                    yield _sample(match, index, row, columns)

    def _columns_of(self, url: str) -> tuple[int, int]:
        if url not in self._columns:
            with open_binary(url) as file:
                self._columns[url] = _columns(_records(file, self.config.csv_separator), url, self.config)
        return self._columns[url]


def _sample(match: re.Match[str], index: int, row: list[str], columns: tuple[int, int]) -> RawSample:
    path, caption = (row[column] if column < len(row) else "" for column in columns)
    fields = {"txt": caption.encode()}
    content = _picture(path, match["url"]) if path else None
    if content is not None:
        extension = path.rpartition(".")[2].lower()
        fields[extension if extension in IMAGE_EXTENSIONS else "jpg"] = content
    return RawSample(f"{int(match['first']) + index}:{path}", match["url"], index, fields)


def _picture(path: str, list_url: str) -> bytes | None:
    """The file's content; a relative path counts from the working directory, then from the list's folder."""
    if is_local(path):
        path = local_path(path)
        beside = os.path.join(os.path.dirname(local_path(list_url)), path)
        path = beside if is_local(list_url) and not os.path.exists(path) else path
    try:
        return read_file(path)
    except StorageError:
        return None


def _records(file: IO[bytes], separator: str, offset: int = 0) -> Iterator[tuple[int, list[str]]]:
    """The CSV records of `file`, which begins at byte `offset` of the list, each with the byte where it begins."""
    begin = end = offset

    def lines() -> Iterator[str]:
        nonlocal end
        for line in file:
            encoding = "utf-8-sig" if end == 0 else "utf-8"
            end += len(line)
            yield line.decode(encoding, errors="replace").replace("\0", "")

    # csv.reader takes exactly the lines of a record before it returns it, so `end` is where the next one begins.
    for row in csv.reader(lines(), delimiter=separator):
        if row:
            yield begin, row
        begin = end


def _columns(records: Iterator[tuple[int, list[str]]], url: str, config: CsvFields) -> tuple[int, int]:
    """Positions of the picture's and the caption's column in the header row."""
    _, header = next(records, (0, []))
    for key, flag in ((config.csv_img_key, "--csv-img-key"), (config.csv_caption_key, "--csv-caption-key")):
        if key not in header:
            hint = "; is --csv-separator right?" if len(header) == 1 else ""
            raise DataConfigError(
                f"{mask_url(url)}: no column {key!r} ({flag}); columns: {', '.join(header) or 'none'}{hint}"
            )
    return header.index(config.csv_img_key), header.index(config.csv_caption_key)


def _cut_rows(url: str, config: CsvFields, rows_per_shard: int) -> list[tuple[int, int, int]]:
    """(first row, rows, byte offset) of each virtual shard of a list."""
    try:
        with open_binary(url) as file:
            records = _records(file, config.csv_separator)
            _columns(records, url, config)
            offsets = [offset for offset, _ in records]
    except (StorageError, csv.Error) as error:
        raise DataConfigError(f"{mask_url(url)}: cannot be read as a CSV list ({error})") from error
    if not offsets:
        raise DataConfigError(f"{mask_url(url)}: has no rows")
    firsts = range(0, len(offsets), rows_per_shard)
    return [(first, min(rows_per_shard, len(offsets) - first), offsets[first]) for first in firsts]
