"""How many samples each shard holds, as far as that is known without reading pictures.

Sources of knowledge, in this order: `sizes.json` ({shard name: samples}, OpenCLIP's) in the shard's folder,
img2dataset's `<shard>_stats.json` and our own `<shard>_index.json` beside it, and for local tars a walk over
their headers.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data.errors import ShardError, StorageError
from data.files import read_file
from data.shard_index import read_index
from data.storage import Retry, open_stream
from data.tar import count_tar_samples
from data.urls import Source, is_local, is_pipe, local_path

_THREADS = 16


def count_samples(sources: Sequence[Source]) -> tuple[int, ...] | None:
    """Samples of each shard, over all sources in order; None when any shard's count cannot be known cheaply.

    A shard that cannot be walked counts as unknown, not as an error: reading it will tell more.
    """
    urls = [url for source in sources for url in source.urls]
    if any(is_pipe(url) for url in urls):
        return None
    counts = _from_sizes_json(urls)
    missing = [url for url in urls if url not in counts]
    # One look before thousands: a set either has the files of its writer beside every shard or beside none.
    if missing and not is_local(missing[0]) and _count_one(missing[0]) is None:
        return None
    with ThreadPoolExecutor(_THREADS) as pool:
        counts |= {
            url: count for url, count in zip(missing, pool.map(_count_one, missing), strict=True) if count is not None
        }
    return tuple(counts[url] for url in urls) if len(counts) >= len(set(urls)) else None


def total_samples(sources: Sequence[Source]) -> int | None:
    """Samples of all shards together: from the counts, or from a `__len__` file in the folder of each source."""
    counts = count_samples(sources)
    if counts is not None:
        return sum(counts)
    folders = {_split(url)[0] for source in sources for url in source.urls if not is_pipe(url)}
    lengths = [_read_json(_join(folder, "__len__")) for folder in sorted(folders)]
    whole = lengths and not any(is_pipe(url) for source in sources for url in source.urls)
    return sum(lengths) if whole and all(_is_count(length) for length in lengths) else None


def sizes_url(url: str) -> str:
    """Where the counts of shard `url` and of those beside it lie: `sizes.json` in its folder."""
    return _join(_split(url)[0], "sizes.json")


def shard_name(url: str) -> str:
    """What `sizes.json` calls shard `url`."""
    return _split(url)[1]


def _from_sizes_json(urls: Sequence[str]) -> dict[str, int]:
    contents = {path: _read_json(path) for path in sorted({sizes_url(url) for url in urls})}
    sizes = {path: content if isinstance(content, dict) else {} for path, content in contents.items()}
    found: dict[str, Any] = {url: sizes[sizes_url(url)].get(shard_name(url)) for url in urls}
    return {url: count for url, count in found.items() if _is_count(count)}


def _count_one(url: str) -> int | None:
    folder, name = _split(url)
    stats = _read_json(_join(folder, f"{name.removesuffix('.tar')}_stats.json"))
    if isinstance(stats, dict) and _is_count(stats.get("successes")):
        return int(stats["successes"])
    index = read_index(url)
    if index is not None:
        return index.samples
    return _walk(url) if is_local(url) else None


def _walk(url: str) -> int | None:
    """Samples of a local tar by its headers: contents are seeked over, and keys grouped as the reader does it."""
    try:
        with open_stream(url, retry=Retry(attempts=1)) as stream:
            return count_tar_samples(stream, url)
    except ShardError:
        return None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _split(url: str) -> tuple[str, str]:
    """Folder and name of a shard; the query of a URL belongs to neither."""
    path = local_path(url) if is_local(url) else url.split("?")[0]
    return posixpath.split(path)


def _join(folder: str, name: str) -> str:
    return os.path.join(folder, name) if folder else name


def _read_json(url: str) -> Any:
    """The parsed file, or None when it is absent, unreadable or no JSON: an index is help, never a requirement."""
    try:
        return json.loads(read_file(url))
    except (StorageError, ValueError):
        return None
