"""`python -m scripts.index_shards SHARDS`: counts samples and notes where they begin, in files beside the shards.

For each shard `<shard>_index.json` (a run that begins in the middle of it need not read the rest), and for each
folder `sizes.json`, as OpenCLIP reads it. Remote shards are read and indexed where they lie.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from data import (
    DataConfigError,
    DataError,
    ShardError,
    ShardIndex,
    StorageError,
    build_index,
    index_url,
    is_pipe,
    mask_url,
    open_stream,
    read_file,
    shard_name,
    sizes_url,
    sources_of,
    write_file,
)

_HEADERS_BYTES = 1 << 20  # of a ranged read: contents in between are passed over where they are larger


def main(argv: Sequence[str] | None = None) -> int:
    """Walks the headers of the tars; contents are not read where that can be helped. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.index_shards", description=__doc__.splitlines()[0])
    parser.add_argument(
        "shards", help="as --train-data names them: braces, a folder, s3://, several joined by ::, a mixture"
    )
    parser.add_argument("--jobs", type=int, default=8, help="shards read at a time (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a sizes.json that is there already")
    args = parser.parse_args(argv)
    try:
        for path, counts in index(args.shards, max(1, args.jobs), args.overwrite).items():
            print(f"{mask_url(path)}: {sum(counts.values())} samples in {len(counts)} shards")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def index(shards: str, jobs: int = 8, overwrite: bool = False) -> dict[str, dict[str, int]]:
    """Writes the indexes, then a sizes.json into each folder; returns the latter's contents by URL.

    A sizes.json that is there keeps its other entries. Raises DataConfigError.
    """
    urls = list(dict.fromkeys(url for source in sources_of(shards) for url in source.urls))
    for url in urls:
        if is_pipe(url):
            raise DataConfigError(f"{mask_url(url)}: a command's output has no place for an index; name the object")
    sizes = {path: _sizes_there(path, overwrite) for path in dict.fromkeys(map(sizes_url, urls))}
    with ThreadPoolExecutor(jobs) as pool:
        for url, found in zip(urls, pool.map(_index_one, urls), strict=True):
            sizes[sizes_url(url)][shard_name(url)] = found.samples
    for path, content in sizes.items():
        write_file(path, json.dumps(content, indent=1).encode() + b"\n")
    return sizes


def _index_one(url: str) -> ShardIndex:
    try:
        with open_stream(url, chunk_bytes=_HEADERS_BYTES, read_ahead=1) as stream:
            found = build_index(stream, url)
    except ShardError as error:
        raise DataConfigError(f"{error}; python -m scripts.check_shards tells more") from error
    write_file(index_url(url), found.to_json())
    return found


def _sizes_there(path: str, overwrite: bool) -> dict[str, int]:
    """What is there already. DataConfigError if it may not be replaced, StorageError if nobody knows."""
    try:
        content = read_file(path)
    except StorageError as error:
        if error.kind != "missing":
            raise
        return {}
    if not overwrite:
        raise DataConfigError(f"{mask_url(path)} is there already; --overwrite replaces its entries for these shards")
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError):
        return {}


if __name__ == "__main__":
    sys.exit(main())
