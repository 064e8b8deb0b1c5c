"""Where samples begin in a tar: `<shard without .tar>_index.json`, written by `scripts.index_shards`.

With it a lane that begins in the middle of a shard reads from there instead of from the shard's first byte.
An index is help, never a requirement: a missing, unreadable or outdated one costs time, not samples.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import NamedTuple

from data.errors import StorageError
from data.files import read_file
from data.storage import ByteStream
from data.tar import walk_samples
from data.urls import is_local, is_pipe, local_path

STRIDE = 32  # samples from one entry to the next
_MOST_KEPT = 64  # indexes a process holds; a lane looks up a shard once


class Entry(NamedTuple):
    """Sample `number` of a shard: its key, and the byte at which it begins."""

    number: int
    key: str
    offset: int


@dataclass(frozen=True)
class ShardIndex:
    """Every `stride`-th sample of a shard of `samples`, from the first on. No entries where a tar is compressed."""

    samples: int
    stride: int
    keys: list[str]
    offsets: list[int]

    def before(self, number: int) -> Entry | None:
        """The last entry at or before sample `number`."""
        place = min(number // self.stride, len(self.offsets) - 1)
        return Entry(place * self.stride, self.keys[place], self.offsets[place]) if place >= 0 else None

    def to_json(self) -> bytes:
        """The content of the index's file."""
        return json.dumps(asdict(self), separators=(",", ":")).encode() + b"\n"


def index_url(url: str) -> str:
    """Where the index of shard `url` lies; a query stays behind it."""
    path, question, query = (local_path(url), "", "") if is_local(url) else url.partition("?")
    for ending in (".tar", ".tar.gz", ".tgz"):
        path = path.removesuffix(ending)
    return f"{path}_index.json{question}{query}"


def build_index(stream: ByteStream, url: str, stride: int = STRIDE) -> ShardIndex:
    """The index of the tar in `stream`, from its headers alone where the stream can skip. Raises ShardError."""
    keys: list[str] = []
    offsets: list[int] = []
    count = 0
    for key, offset in walk_samples(stream, url):
        if count % stride == 0 and offset >= 0:
            keys.append(key)
            offsets.append(offset)
        count += 1
    return ShardIndex(count, stride, keys, offsets)


def read_index(url: str) -> ShardIndex | None:
    """The index beside shard `url`; None when there is none, or none that this version can read."""
    if is_pipe(url):
        return None
    try:
        value = json.loads(read_file(index_url(url)))
        index = ShardIndex(int(value["samples"]), int(value["stride"]), list(value["keys"]), list(value["offsets"]))
    except (StorageError, ValueError, KeyError, TypeError):
        return None
    return index if index.stride > 0 and len(index.keys) == len(index.offsets) else None


class Indexes:
    """The indexes that a reader asks for. Folders without any are asked once."""

    def __init__(self) -> None:
        self._found: dict[str, ShardIndex] = {}
        self._without: set[str] = set()

    def before(self, url: str, number: int) -> Entry | None:
        """The last entry at or before sample `number` of shard `url`; None when there is no index."""
        folder = url.rpartition("/")[0]
        if folder in self._without or is_pipe(url):
            return None
        index = self._found.get(url) or read_index(url)
        if index is None:
            self._without.add(folder)
            return None
        if len(self._found) >= _MOST_KEPT:
            self._found.pop(next(iter(self._found)), None)
        self._found[url] = index
        return index.before(number)
