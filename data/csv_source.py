"""CSV and TSV lists of pictures and captions, cut into virtual shards of rows so that they are read like tars.

A virtual shard carries the byte at which its rows begin: a reader needs nothing else. Knows nothing of lanes or
batches.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Generator, Iterable, Iterator
from typing import IO, Any

from data.errors import DataConfigError, StorageError
from data.files import open_binary
from data.rows import CsvFields, RowRange, check_columns, sample_of, wanted_columns
from data.samples import RawSample
from data.urls import mask_url

ROWS_PER_SHARD = 1000

_LONGEST_NUMBER = 64  # characters; what is longer is a code
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")


def cut_csv(url: str, config: CsvFields, rows_per_shard: int = ROWS_PER_SHARD) -> list[RowRange]:
    """The ranges of a list's rows. DataConfigError when it cannot be read, has no rows or lacks a column."""
    try:
        with open_binary(url) as file:
            records = _records(file, config.csv_separator)
            _header_of(records, url, config)
            offsets = [offset for offset, _ in records]
    except (StorageError, csv.Error) as error:
        raise DataConfigError(f"{mask_url(url)}: cannot be read as a CSV list ({error})") from error
    if not offsets:
        raise DataConfigError(f"{mask_url(url)}: has no rows")
    firsts = range(0, len(offsets), rows_per_shard)
    return [
        RowRange(url, first, min(first + rows_per_shard, len(offsets)), {"byte": offsets[first]}) for first in firsts
    ]


class CsvReader:
    """Reads ranges of rows; `fields` are the columns that records need.

    In a record a number as JSON writes it is a number, an empty field is None, and all else is text.
    """

    def __init__(self, config: CsvFields, fields: Iterable[str] = ()):
        self.config = config
        self.fields = frozenset(fields)
        self._headers: dict[str, list[str]] = {}

    def read(self, rows: RowRange, start: int, stop: int) -> Generator[RawSample, None, None]:
        """Samples `start` to `stop` of a range, in order, the caption under `txt`. StorageError, csv.Error."""
        header = self._header(rows.url)
        columns = {name: header.index(name) for name in wanted_columns(header, self.fields)}
        image, caption = header.index(self.config.csv_img_key), header.index(self.config.csv_caption_key)
        offset = rows.place["byte"]
        with open_binary(rows.url, offset) as file:
            records = _records(file, self.config.csv_separator, offset)
            for index, (_, row) in enumerate(itertools.islice(records, stop)):
                if index >= start:
                    record = {name: _value(_at(row, column)) for name, column in columns.items()} if columns else None
                    yield sample_of(rows, index, _at(row, image), _at(row, caption), record)

    def _header(self, url: str) -> list[str]:
        if url not in self._headers:
            with open_binary(url) as file:
                self._headers[url] = _header_of(_records(file, self.config.csv_separator), url, self.config)
        return self._headers[url]


def _at(row: list[str], column: int) -> str:
    return row[column] if column < len(row) else ""


def _value(text: str) -> Any:
    is_number = len(text) <= _LONGEST_NUMBER and _NUMBER.fullmatch(text)
    return json.loads(text) if is_number else text or None


def _header_of(records: Iterator[tuple[int, list[str]]], url: str, config: CsvFields) -> list[str]:
    """The first row, in which both columns must be."""
    _, header = next(records, (0, []))
    check_columns(header, url, config)
    return header


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
