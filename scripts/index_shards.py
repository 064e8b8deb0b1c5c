"""`python -m scripts.index_shards SHARDS`: counts the samples of local shards and writes sizes.json beside them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from data import DataConfigError, DataError, count_samples, expand_sources, is_local, local_path


def main(argv: Sequence[str] | None = None) -> int:
    """Counts by the headers of the tars, without reading contents. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.index_shards", description=__doc__)
    parser.add_argument(
        "shards", help="local shards as --train-data names them: braces, a folder, several joined by ::"
    )
    args = parser.parse_args(argv)
    try:
        for path, counts in index(args.shards).items():
            print(f"{path}: {sum(counts.values())} samples in {len(counts)} shards")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def index(shards: str) -> dict[Path, dict[str, int]]:
    """Writes a sizes.json into each folder and returns their contents by path. Raises DataConfigError."""
    sources = expand_sources(shards)
    urls = [url for source in sources for url in source.urls]
    for url in urls:
        if not is_local(url):
            raise DataConfigError(f"{url}: only local shards can be counted; index them before the upload")
        if (beside := Path(local_path(url)).with_name("sizes.json")).exists():
            raise DataConfigError(f"{beside} is there already; remove it to count anew")
    counts = count_samples(sources)
    if counts is None:
        raise DataConfigError(
            f"{shards}: not every shard is a whole tar file; python -m scripts.check_shards tells more"
        )
    folders: dict[Path, dict[str, int]] = defaultdict(dict)
    for url, count in zip(urls, counts, strict=True):
        path = Path(local_path(url))
        folders[path.with_name("sizes.json")][path.name] = count
    for path, content in folders.items():
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, path)
    return dict(folders)


if __name__ == "__main__":
    sys.exit(main())
