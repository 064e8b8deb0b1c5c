"""Parquet lists of pictures and captions, cut into virtual shards inside their row groups. Needs pyarrow.

The column of pictures holds paths or URLs, the files' bytes, or structs of both as Hugging Face's datasets write
them. A reader goes through its row group in small batches of the columns that it needs; what it holds is bounded
by that row group, not by the file: a few times its size, where a writer put all its pictures into one page. Knows
nothing of lanes or batches.
"""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from data.errors import DataConfigError, ShardError
from data.files import open_seekable
from data.rows import CsvFields, RowRange, check_columns, sample_of, wanted_columns
from data.samples import RawSample
from data.urls import is_pipe, mask_url

ROWS_PER_SHARD = 10_000  # of a list of URLs, whose row groups may hold a million; those with pictures are smaller

_ROWS_AT_ONCE = 64
_BUFFER_BYTES = 1 << 20


def cut_parquet(url: str, config: CsvFields, rows_per_shard: int = ROWS_PER_SHARD) -> list[RowRange]:
    """The ranges of a list's rows, none of them in two row groups.

    DataConfigError when pyarrow is not there, or the list cannot be read, has no rows or lacks a column.
    """
    if is_pipe(url):
        raise DataConfigError(f"{mask_url(url)}: a Parquet list cannot come from a pipe: it is read from its end")
    try:
        with _opened(url) as file:
            check_columns(file.schema_arrow.names, url, config)
            _check_type(file.schema_arrow.field(config.csv_img_key), url)
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    except ShardError as error:
        raise DataConfigError(f"{mask_url(url)}: cannot be read as a Parquet list ({error.reason})") from error
    ranges, first = [], 0
    for group, size in enumerate(sizes):
        for skip in range(0, size, rows_per_shard):
            count = min(rows_per_shard, size - skip)
            ranges.append(RowRange(url, first + skip, first + skip + count, {"group": group, "skip": skip}))
        first += size
    if not ranges:
        raise DataConfigError(f"{mask_url(url)}: has no rows")
    return ranges


class ParquetReader:
    """Reads ranges of rows; `fields` are the columns that records need."""

    def __init__(self, config: CsvFields, fields: Iterable[str] = ()):
        self.config = config
        self.fields = frozenset(fields)

    def read(self, rows: RowRange, start: int, stop: int) -> Generator[RawSample, None, None]:
        """Samples `start` to `stop` of a range, in order, the caption under `txt`. Raises ShardError."""
        image_key, caption_key = self.config.csv_img_key, self.config.csv_caption_key
        with _opened(rows.url) as file:
            columns = wanted_columns(file.schema_arrow.names, self.fields)
            for index, row in self._rows(file, rows, start, stop, [image_key, caption_key, *columns]):
                image, path = _image(row[image_key])
                record = {name: _plain(row[name]) for name in columns} if columns else None
                caption = row[caption_key]
                yield sample_of(rows, index, image, caption if isinstance(caption, str) else "", record, path)

    def _rows(
        self, file: Any, rows: RowRange, start: int, stop: int, columns: list[str]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number in the range, row) of the rows that are wanted."""
        group, at = rows.place["group"], -rows.place["skip"]
        for batch in file.iter_batches(
            batch_size=_ROWS_AT_ONCE, row_groups=[group], columns=list(dict.fromkeys(columns)), use_threads=False
        ):
            low, high = max(start, at), min(stop, at + batch.num_rows)
            if low < high:
                yield from enumerate(batch.slice(low - at, high - low).to_pylist(), low)
            at += batch.num_rows
            if at >= stop:
                return


@contextmanager
def _opened(url: str) -> Iterator[Any]:
    """The Parquet file; what pyarrow finds wrong with it becomes a ShardError."""
    parquet, failures = _pyarrow()
    with open_seekable(url) as file:
        try:
            yield parquet.ParquetFile(file, buffer_size=_BUFFER_BYTES)
        except (failures, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ShardError(mask_url(url), f"broken Parquet ({reason})", "corrupt") from error


def _pyarrow() -> tuple[Any, Any]:
    """pyarrow's Parquet module, and the class of its errors."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataConfigError(
            f"--train-data: Parquet lists need pyarrow ({error}); the extra has it: pip install clipyard[parquet]"
        ) from error
    return pyarrow.parquet, pyarrow.ArrowException


def _check_type(field: Any, url: str) -> None:
    import pyarrow

    kind = field.type.value_type if pyarrow.types.is_dictionary(field.type) else field.type
    is_text = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
    is_bytes = pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
    is_struct = pyarrow.types.is_struct(kind) and {"bytes", "path"} & {
        kind.field(i).name for i in range(kind.num_fields)
    }
    if not (is_text or is_bytes or is_struct):
        raise DataConfigError(
            f"{mask_url(url)}: column {field.name!r} (--csv-img-key) holds {field.type}; known are text (a path or "
            "URL), binary (the picture), and structs with bytes and path"
        )


def _image(value: Any) -> tuple[str | bytes, str]:
    """The picture or where it is, and a name for the former."""
    if isinstance(value, dict):
        path = value.get("path") or ""
        return value.get("bytes") or path, path
    return value or "", ""


def _plain(value: Any) -> Any:
    """`value` as JSON could hold it: times as text, decimals as numbers, bytes not at all."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value if isinstance(value, str | int | float | None) else None
