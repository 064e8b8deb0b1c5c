"""A mixture: sources with proportions by samples, as a YAML list. Knows nothing of lanes or of what shards hold.

`--train-data mixture.yaml` names the file (a path or any URL); a text that begins with `[` is the list itself.

    - name: laion
      shards: s3://bucket/laion2b/{00000..41455}.tar    # one pattern as in --train-data, or a list of them
      proportion: 3                                     # of the samples, relative to the other sources
    - name: coyo
      shards: [s3://bucket/coyo/{000..499}.tar, s3://bucket/coyo-extra/{00..20}.tar]
      proportion: 1
"""

from __future__ import annotations

import difflib
import math
import re
from typing import Any

import yaml

from data.errors import DataConfigError, StorageError
from data.urls import Source, expand_sources, is_pipe, mask_url

_KEYS = ("name", "shards", "proportion")


def is_mixture(train_data: str) -> bool:
    """Whether `--train-data` is a mixture or names one, rather than shards."""
    text = train_data.strip()
    return text.startswith("[") or (not is_pipe(text) and text.split("?")[0].lower().endswith((".yaml", ".yml")))


def read_mixture(train_data: str) -> tuple[Source, ...]:
    """The sources of a mixture, each with its proportion and at least one shard.

    Raises DataConfigError naming the entry and what would be valid.
    """
    where, text = _text_of(train_data)
    try:
        entries = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataConfigError(f"{where}: no YAML ({' '.join(str(error).split())})") from error
    if isinstance(entries, dict) and set(entries) == {"sources"}:
        entries = entries["sources"]
    if not isinstance(entries, list) or not entries:
        raise DataConfigError(f"{where}: expected a list of sources, each with {', '.join(_KEYS)}")
    sources = tuple(_source_of(entry, f"{where}: source {number}") for number, entry in enumerate(entries, 1))
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataConfigError(f"{where}: two sources are called {twice[0]!r}")
    return sources


def _text_of(train_data: str) -> tuple[str, str]:
    """How messages call the mixture, and its YAML."""
    if train_data.strip().startswith("["):
        return "--train-data", train_data
    from data.files import read_file

    try:
        return f"--train-data {mask_url(train_data)}", read_file(train_data.strip()).decode()
    except (StorageError, UnicodeDecodeError) as error:
        raise DataConfigError(f"--train-data: {error}") from error


def _source_of(entry: Any, where: str) -> Source:
    if not isinstance(entry, dict):
        raise DataConfigError(f"{where}: expected {', '.join(_KEYS)}, got {entry!r}")
    for key in entry:
        if key not in _KEYS:
            close = difflib.get_close_matches(str(key), _KEYS, n=1)
            raise DataConfigError(f"{where}: unknown key {key!r}; {f'did you mean {close[0]}?' if close else _KEYS}")
    name = entry.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise DataConfigError(f"{where}: name: expected letters, digits, '.', '_' and '-', got {name!r}")
    patterns = _patterns(entry.get("shards"))
    if not patterns:
        raise DataConfigError(f"{where} ({name}): shards: expected one pattern as in --train-data, or a list of them")
    try:
        urls = tuple(url for source in expand_sources("::".join(patterns)) for url in source.urls)
    except DataConfigError as error:
        raise DataConfigError(f"{where} ({name}): {error}") from error
    return Source(name, urls, proportion=_proportion(entry.get("proportion"), f"{where} ({name})"))


def _patterns(shards: Any) -> list[str]:
    patterns = [shards] if isinstance(shards, str) else shards
    good = isinstance(patterns, list) and all(isinstance(pattern, str) and pattern.strip() for pattern in patterns)
    return [pattern.strip() for pattern in patterns] if good else []


def _proportion(value: Any, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # text too: YAML reads 1e3 as one
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise DataConfigError(f"{where}: proportion: expected a positive number, got {value!r}")
    return number
