"""Folders of pictures, each with its caption in a file beside it, cut into virtual shards that are read like tars.

Knows nothing of lanes or batches. Keys are those of tars: `set/cat.v2.jpg` and `set/cat.v2.txt` are the sample
`set/cat.v2`, and `cat.seg.png` beside `cat.jpg` is no sample unless it has a text of its own. Hidden files and
`__MACOSX` are passed over.

A virtual shard is "<folder>#pictures=<first>-<stop>&names=<names>": it carries the names of its pictures, deflated.
The folder is listed once, by whoever cuts it, one directory in memory at a time; a picture that comes later is not
seen, one that goes counts as a sample without image, and a resume over another listing is refused, because the
list of shards is another one then. A million pictures named by hashes take some 30 MB of shard names.
"""

from __future__ import annotations

import base64
import itertools
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from data.errors import DataConfigError, StorageError
from data.files import read_file
from data.samples import IMAGE_EXTENSIONS, RawSample
from data.urls import Source, is_local, local_path, mask_url

PICTURES_PER_SHARD = 1000

_VIRTUAL = re.compile(r"^(?P<root>.*)#pictures=(?P<first>\d+)-(?P<stop>\d+)&names=(?P<names>[\w=-]*)$", re.DOTALL)
_TEXTS = ("txt", "json", "caption")


def folder_shards(
    sources: tuple[Source, ...], pictures_per_shard: int = PICTURES_PER_SHARD
) -> tuple[tuple[Source, ...], tuple[int, ...]]:
    """The sources with virtual shards in place of folders, and the pictures in each shard, over all sources in order.

    Raises DataConfigError when something is no local directory, cannot be listed, or holds no picture.
    """
    cut, counts = [], []
    for source in sources:
        shards: list[str] = []
        for url in source.urls:
            for first, names in _cut(url, pictures_per_shard):
                shards.append(f"{local_path(url)}#pictures={first}-{first + len(names)}&names={_pack(names)}")
                counts.append(len(names))
        cut.append(replace(source, urls=tuple(shards)))
    return tuple(cut), tuple(counts)


class FolderReader:
    """Reads virtual shards: each picture with those files beside it whose extensions are among `extensions`."""

    def __init__(self, extensions: Sequence[str] = ("txt",)):
        self.extensions = tuple(extensions)

    def read(self, url: str, start: int = 0, stop: int | None = None) -> Iterator[RawSample]:
        """Samples `start` to `stop` of a virtual shard, in order; files that cannot be read are left out.

        Raises StorageError when the folder is gone.
        """
        match = _VIRTUAL.match(url)
        assert match is not None, f"not a virtual shard: {mask_url(url)}"
        root = match["root"]
        if not os.path.isdir(root):
            raise StorageError(root, "no such directory", "missing")
        for index, name in enumerate(_unpack(match["names"])[:stop]):
            if index >= start:
                yield self._sample(root, name, index)

    def _sample(self, root: str, name: str, index: int) -> RawSample:
        key, extension = _split(name)
        fields = {extension: _content(root, name)}
        for wanted in self.extensions:
            content = _content(root, f"{key}.{wanted}")
            fields[wanted] = _content(root, f"{key}.{wanted.upper()}") if content is None else content
        found = {name: content for name, content in fields.items() if content is not None}
        return RawSample(os.fsencode(key).decode(errors="replace"), root, index, found)


def _cut(url: str, pictures_per_shard: int) -> Iterator[tuple[int, list[str]]]:
    """(first picture, names) of each virtual shard of a folder."""
    root = local_path(url)
    if not is_local(url) or not os.path.isdir(root):
        raise DataConfigError(
            f"--train-data {mask_url(url)}: --dataset-type folder reads local directories; pictures elsewhere can be "
            "named in a CSV or Parquet list"
        )
    names, first = _pictures(root), 0
    while shard := list(itertools.islice(names, pictures_per_shard)):
        yield first, shard
        first += len(shard)
    if not first:
        raise DataConfigError(f"--train-data {root}: holds no picture ({', '.join(IMAGE_EXTENSIONS[:4])}, ...)")


def _pictures(root: str, folder: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Names of the pictures, from `root` on: those of a directory in order, then those of each one inside it."""
    try:
        status = os.stat(os.path.join(root, folder))
        with os.scandir(os.path.join(root, folder)) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX"]
            folders = sorted(entry.name for entry in visible if entry.is_dir())
            files = {entry.name for entry in visible} - set(folders)
    except OSError as error:
        raise DataConfigError(
            f"--train-data {os.path.join(root, folder)}: cannot be listed ({error.strerror})"
        ) from error
    place = (status.st_dev, status.st_ino)
    if place in above:  # a link to a directory that it lies in
        return
    yield from (os.path.join(folder, name) for name in _samples(files))
    for name in folders:
        yield from _pictures(root, os.path.join(folder, name), (*above, place))


def _samples(files: set[str]) -> list[str]:
    """The pictures of a directory that stand for samples, in the order of their keys."""
    best: dict[str, tuple[int, str]] = {}
    for name in files:
        key, extension = _split(name)
        if key and extension in IMAGE_EXTENSIONS:
            rank = IMAGE_EXTENSIONS.index(extension), name
            best[key] = min(rank, best.get(key, rank))
    return [best[key][1] for key in sorted(best) if not _is_part(key, best.keys(), files)]


def _is_part(key: str, keys: Iterable[str], files: set[str]) -> bool:
    """Whether `x.seg` is a part of a sample `x`, rather than one of its own."""
    shorter = [key[:place] for place, sign in enumerate(key) if sign == "." and place]
    return any(one in keys for one in shorter) and not any(f"{key}.{text}" in files for text in _TEXTS)


def _split(name: str) -> tuple[str, str]:
    """Key and lower-case extension, at the last dot of the name; no extension where the dot is the folder's."""
    key, dot, extension = name.rpartition(".")
    return (key, extension.lower()) if dot and "/" not in extension else (name, "")


def _content(root: str, name: str) -> bytes | None:
    try:
        return read_file(os.path.join(root, name))
    except StorageError:
        return None


def _pack(names: Sequence[str]) -> str:
    return base64.urlsafe_b64encode(zlib.compress(b"\0".join(map(os.fsencode, names)), 9)).decode()


def _unpack(text: str) -> list[str]:
    return [os.fsdecode(name) for name in zlib.decompress(base64.urlsafe_b64decode(text)).split(b"\0")]
