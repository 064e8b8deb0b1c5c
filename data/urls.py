"""What `--train-data` names: sources, and the shards in each. Opens nothing; looks at local paths only.

`::` joins sources, braces expand (inside `pipe:` commands too), a local directory stands for its `*.tar`
files, or without any for the pictures in it, and a local pattern with `*` for what it matches.
"""

from __future__ import annotations

import glob
import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from braceexpand import braceexpand

from data.errors import DataConfigError
from data.samples import IMAGE_EXTENSIONS

_CHECK_ALL_BELOW = 10_000  # looking at every file of a longer list would hold up the start on network disks
_NUM_PROBES = 200
_FOLDERS_LOOKED_AT = 1000  # for a picture
_TAR = (".tar", ".tar.gz", ".tgz")
_TABLE = (".csv", ".tsv", ".parquet", ".pq")


@dataclass(frozen=True)
class Source:
    """One `::` part of `--train-data`, or one entry of a mixture: shards that are counted together.

    factor: multiplies the weight of each of its shards when shards are drawn with replacement.
    proportion: in a mixture, its share of the samples, relative to the other sources'.
    """

    name: str
    urls: tuple[str, ...]
    factor: float = 1.0
    proportion: float | None = None


def expand_sources(train_data: str, factors: str | None = None, dataset_type: str = "auto") -> tuple[Source, ...]:
    """The sources of `train_data`, each with at least one shard, list or folder of pictures.

    Directories are folders of pictures if `dataset_type` says "folder", or "auto" and they hold no tar.
    Raises DataConfigError when a part names nothing, local files are missing (how many, and the first), or
    `factors` ("1::2") are not as many positive numbers as there are sources.
    """
    patterns = train_data.split("::")
    weights = _parse_factors(factors, len(patterns))
    names = _unique([_short_name(pattern) for pattern in patterns])
    return tuple(
        Source(name, _expand(pattern.strip(), dataset_type), weight)
        for name, pattern, weight in zip(names, patterns, weights, strict=True)
    )


def dataset_type_of(train_data: str) -> str:
    """What `--dataset-type auto` means for `train_data`: webdataset, csv or folder; DataConfigError if none of them."""
    kinds = {_kind_of(pattern.strip()) for pattern in train_data.split("::")}
    if len(kinds) > 1:
        raise DataConfigError(
            f"--train-data {mask_url(train_data)}: all sources must be of one kind, found {sorted(kinds)}"
        )
    return kinds.pop()


def is_local(url: str) -> bool:
    """Whether `url` is a path on this machine, with or without `file:`."""
    return not is_pipe(url) and (url.startswith("file:") or "://" not in url)


def is_pipe(url: str) -> bool:
    """Whether `url` is a command whose output is the shard."""
    return url.startswith("pipe:")


def local_path(url: str) -> str:
    """The path of a local `url`, `~` expanded."""
    path = url.removeprefix("file://") if url.startswith("file://") else url.removeprefix("file:")
    return os.path.expanduser(path)


def mask_url(url: str) -> str:
    """`url` or command as it may be logged: passwords, tokens and signatures replaced by ***."""
    masked = re.sub(r"(://)[^/@\s]+@", r"\1***@", url)
    masked = re.sub(r"([?&][\w.-]+=)[^&\s\"']+", r"\1***", masked)
    masked = re.sub(r"(?i)(authorization:\s*(?:bearer|basic)?\s*)[^\s\"']+", r"\1***", masked)
    return re.sub(
        r"(?i)([\w-]*(?:secret|token|password|passwd|api[_-]?key|access[_-]key)[\w-]*[=\s]\s*)(?!\*)[^\s\"'&]+",
        r"\1***",
        masked,
    )


def _parse_factors(factors: str | None, num_sources: int) -> list[float]:
    if factors is None:
        return [1.0] * num_sources
    parts = factors.split("::")
    if len(parts) != num_sources:
        raise DataConfigError(
            f"--train-data-upsampling-factors {factors}: {len(parts)} factors for {num_sources} sources of --train-data"
        )
    return [_positive(part) for part in parts]


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise DataConfigError(f"--train-data-upsampling-factors: {text!r} is not a positive number")
    return value


def _expand(pattern: str, dataset_type: str) -> tuple[str, ...]:
    if not pattern:
        raise DataConfigError("--train-data: an empty source; write one path or URL on each side of ::")
    try:
        urls = [url for expanded in braceexpand(pattern) for url in _expand_local(expanded, dataset_type)]
    except ValueError as error:
        raise DataConfigError(f"--train-data {mask_url(pattern)}: braces do not match ({error})") from error
    if not urls:
        raise DataConfigError(f"--train-data {mask_url(pattern)}: matches no file{_looked_at(pattern, dataset_type)}")
    _check_present(pattern, urls)
    return tuple(urls)


def _expand_local(url: str, dataset_type: str) -> list[str]:
    """Directories and `*` patterns become files; everything else stays as it is."""
    if not is_local(url):
        if not is_pipe(url) and "*" in urlsplit(url).path:
            raise DataConfigError(
                f"--train-data {mask_url(url)}: * works on local paths only; use braces, e.g. {{00000..00123}}"
            )
        return [url]
    path = local_path(url)
    if os.path.isdir(path):
        is_folder = dataset_type == "folder" or (dataset_type == "auto" and _is_picture_folder(path))
        return [path] if is_folder else _tars_in(path)
    if not os.path.exists(path) and any(sign in path for sign in "*?["):
        return sorted(glob.glob(path))
    return [path]


def _tars_in(path: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))


def _is_picture_folder(path: str) -> bool:
    """Whether a directory holds no tar and, somewhere below, a picture."""
    if _tars_in(path):
        return False
    for _, _, names in itertools.islice(os.walk(path, followlinks=True), _FOLDERS_LOOKED_AT):
        if any(name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS for name in names):
            return True
    return False


def _looked_at(pattern: str, dataset_type: str) -> str:
    path = local_path(pattern)
    wanted = "no *.tar and no picture" if dataset_type == "auto" else "no *.tar"
    return f" (the directory {path} holds {wanted})" if os.path.isdir(path) else ""


def _check_present(pattern: str, urls: Sequence[str]) -> None:
    local = [url for url in urls if is_local(url)]
    probed = local if len(local) <= _CHECK_ALL_BELOW else _spread(local, _NUM_PROBES)
    missing = [path for path in probed if not os.path.exists(path)]
    if missing:
        total = f"{len(missing)} of {len(probed)} files" + (" looked at" if len(probed) < len(local) else "")
        expanded = "" if pattern == missing[0] else f" (expands to {len(urls)} shards)"
        raise DataConfigError(f"--train-data {pattern}{expanded}: {total} missing, the first is {missing[0]}")


def _spread(items: Sequence[str], count: int) -> list[str]:
    """`count` items evenly over the list, first and last included."""
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _kind_of(pattern: str) -> str:
    path = urlsplit(pattern).path if "://" in pattern and not is_pipe(pattern) else pattern
    if is_local(pattern) and os.path.isdir(local_path(pattern)):
        return "folder" if _is_picture_folder(local_path(pattern)) else "webdataset"
    if is_pipe(pattern) or path.lower().endswith(_TAR):
        return "webdataset"
    if path.lower().endswith(_TABLE):
        return "csv"
    raise DataConfigError(
        f"--train-data {mask_url(pattern)}: cannot tell what this is (known: .tar shards, pipe:, a directory of .tar "
        "or of pictures, .csv, .tsv, .parquet); give --dataset-type"
    )


def _short_name(pattern: str) -> str:
    """A name for metrics: the last part of the path that says something besides numbering."""
    words = [word for word in pattern.split() if word.lower().endswith((*_TAR, *_TABLE))] if is_pipe(pattern) else []
    path = re.sub(r"[?#].*$", "", words[0] if words else pattern)
    for part in reversed(path.split("://")[-1].split("/")):
        stem = re.sub(r"\{[^{}]*\.\.[^{}]*\}|\*|\.(tar|tar\.gz|tgz|csv|tsv|parquet|pq)$", "", part, flags=re.IGNORECASE)
        cleaned = re.sub(r"[^A-Za-z0-9._-]+", "_", stem).strip("-_.")
        if re.search(r"[A-Za-z]", cleaned):
            return cleaned
    return "data"


def _unique(names: Sequence[str]) -> list[str]:
    """The names with a counter on repeated ones: a, a-2, a-3."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return result
