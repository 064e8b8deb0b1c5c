"""What lists of pictures have in common, whatever their format: columns, the sample of a row, names of virtual shards.

A virtual shard is "<list>#rows=<first>-<stop>&<how to find them>". Knows no format.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from data.errors import DataConfigError, StorageError
from data.files import read_file
from data.samples import IMAGE_EXTENSIONS, RawSample
from data.urls import is_local, local_path, mask_url

_VIRTUAL = re.compile(r"^(?P<url>.*)#rows=(?P<first>\d+)-(?P<stop>\d+)(?P<place>(?:&\w+=\d+)*)$", re.DOTALL)


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


@dataclass(frozen=True)
class RowRange:
    """Rows `first` to `stop` of list `url`; `place` is what its format needs to find them."""

    url: str
    first: int
    stop: int
    place: Mapping[str, int]

    @property
    def shard(self) -> str:
        """The virtual shard's name."""
        return f"{self.url}#rows={self.first}-{self.stop}" + "".join(f"&{key}={at}" for key, at in self.place.items())

    @classmethod
    def of(cls, shard: str) -> RowRange:
        """The inverse of `shard`."""
        match = _VIRTUAL.match(shard)
        assert match is not None, f"not a virtual shard: {shard}"
        parts = [part.split("=") for part in match["place"].split("&")[1:]]
        return cls(match["url"], int(match["first"]), int(match["stop"]), {key: int(at) for key, at in parts})


def check_columns(columns: Sequence[str], url: str, config: CsvFields) -> None:
    """DataConfigError when the list lacks the column of pictures or of captions."""
    for key, flag in ((config.csv_img_key, "--csv-img-key"), (config.csv_caption_key, "--csv-caption-key")):
        if key not in columns:
            hint = "; is --csv-separator right?" if len(columns) == 1 else ""
            raise DataConfigError(
                f"{mask_url(url)}: no column {key!r} ({flag}); columns: {', '.join(columns) or 'none'}{hint}"
            )


def wanted_columns(columns: Iterable[str], fields: Iterable[str]) -> list[str]:
    """The columns that `fields` of a record come from: "a.b" is a column of that name or a field in the column "a"."""
    wanted = {field for name in fields for field in (name, name.partition(".")[0])}
    return [column for column in columns if column in wanted]


def sample_of(
    rows: RowRange, index: int, image: str | bytes, caption: str, record: Mapping[str, Any] | None, path: str = ""
) -> RawSample:
    """The sample of row `index` of `rows`: `image` is the picture itself, or its path or URL; `path` names the former.

    A picture that cannot be had is left out of the sample.
    """
    name = image if isinstance(image, str) else path
    fields = {"txt": caption.encode(errors="replace")}
    content = (_read_picture(image, rows.url) if image else None) if isinstance(image, str) else image
    if content is not None:
        extension = name.rpartition(".")[2].lower()
        fields[extension if extension in IMAGE_EXTENSIONS else "jpg"] = content
    return RawSample(f"{rows.first + index}{name and ':'}{name}", rows.url, index, fields, record=record)


def _read_picture(path: str, list_url: str) -> bytes | None:
    """The file's content; a relative path counts from the working directory, then from the list's folder."""
    if is_local(path):
        path = local_path(path)
        beside = os.path.join(os.path.dirname(local_path(list_url)), path)
        path = beside if is_local(list_url) and not os.path.exists(path) else path
    try:
        return read_file(path)
    except StorageError:
        return None
