"""Evaluation sets, exactly: every sample once over all ranks, in a fixed order, nothing padded or dropped.

Rank r of w reads the samples whose number leaves r when divided by w. Formats: tars as CLIP_benchmark lays
them out (`test/nshards.txt`, `test/0.tar`..., `classnames.txt`, `zeroshot_classification_templates.txt`), a
folder or list of tars, an image folder with one folder a class, lists and folders of pairs. A picture that cannot be
decoded is an error here: a score over fewer samples is another score.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import torch
from PIL import Image

from data.captions import CaptionConfig, caption_of
from data.decode import decode_rgb
from data.errors import DataConfigError, DataError, ShardError, StorageError
from data.files import read_file
from data.folder_source import FolderReader, folder_shards
from data.prepare import image_of
from data.readers import ShardReader
from data.rows import CsvConfig, CsvFields
from data.samples import IMAGE_EXTENSIONS, RawSample, SampleError
from data.storage import open_stream
from data.table import TableReader, table_shards
from data.tar import read_samples
from data.urls import Source, dataset_type_of, expand_sources, is_local, is_pipe, local_path, mask_url

Transform = Callable[[Image.Image], torch.Tensor]
Tokenize = Callable[[list[str]], torch.Tensor]

_CLASS_NAMES = "classnames.txt"
_TEMPLATES = "zeroshot_classification_templates.txt"
_MAX_PIXELS = 1 << 30


@dataclass
class EvalBatch:
    """Some samples of this rank. `indices` are their numbers in the whole set."""

    images: torch.Tensor  # [B, ...] as the transform gives them, stacked
    indices: torch.Tensor  # int64 [B]
    labels: torch.Tensor | None = None  # int64 [B], of labelled sets
    captions: list[str] | None = None  # of sets of pairs
    tokens: torch.Tensor | None = None  # [B, L], of sets of pairs when a tokenizer was given


@dataclass(frozen=True)
class _Item:
    """One sample before its picture is decoded. `name` is for error messages."""

    name: str
    fetch: Callable[[], bytes]
    target: int | str


def read_pairs(
    url: str | Source,
    rank: int,
    world_size: int,
    transform: Transform,
    tokenize: Tokenize | None = None,
    batch_size: int = 64,
    workers: int = 4,
    caption_key: str = "txt",
    csv_fields: CsvFields | None = None,
) -> Iterator[EvalBatch]:
    """This rank's batches of an image-caption set: any form of `--train-data`.

    `workers` threads decode and transform. Raises DataConfigError when the set is not there, DataError naming
    the sample when a picture or caption is missing or broken.
    """
    items = _pairs(url, caption_key, csv_fields or CsvConfig())
    for batch, texts in _batches(items, rank, world_size, transform, batch_size, workers):
        batch.captions = [str(text) for text in texts]
        batch.tokens = tokenize(batch.captions) if tokenize else None
        yield batch


def read_labelled(
    url: str,
    rank: int,
    world_size: int,
    transform: Transform,
    batch_size: int = 64,
    workers: int = 4,
    split: str = "test",
) -> Iterator[EvalBatch]:
    """This rank's batches of an image-label set: CLIP_benchmark's layout, tars with `.cls`, or an image folder.

    In an image folder a class's label is the place of its folder in sorted order. Raises as `read_pairs`.
    """
    for batch, labels in _batches(_labelled(url, split), rank, world_size, transform, batch_size, workers):
        batch.labels = torch.tensor([int(label) for label in labels], dtype=torch.int64)
        yield batch


def class_names_of(url: str) -> list[str] | None:
    """Names of the classes in label order: `classnames.txt`, else the folders of an image folder, else None."""
    names = _read_lines(url, _CLASS_NAMES)
    return names if names is not None else (_class_folders(url) or None)


def templates_of(url: str) -> list[str] | None:
    """Prompt templates with `{c}` for the class, from `zeroshot_classification_templates.txt`; None without it."""
    return _read_lines(url, _TEMPLATES)


def _batches(
    items: Iterable[_Item], rank: int, world_size: int, transform: Transform, batch_size: int, workers: int
) -> Iterator[tuple[EvalBatch, list[int | str]]]:
    mine = ((index, item) for index, item in enumerate(items) if index % world_size == rank)
    with ThreadPoolExecutor(max(workers, 1)) as pool, closing(_ahead(pool, mine, transform, 2 * batch_size)) as loaded:
        while rows := list(itertools.islice(loaded, batch_size)):
            indices, images, targets = zip(*rows, strict=True)
            yield EvalBatch(torch.stack(images), torch.tensor(indices)), list(targets)


def _ahead(
    pool: ThreadPoolExecutor, items: Iterator[tuple[int, _Item]], transform: Transform, depth: int
) -> Generator[tuple[int, torch.Tensor, int | str], None, None]:
    """Loaded samples in order, with up to `depth` of them under way."""
    waiting: deque[tuple[int, Future[torch.Tensor], int | str]] = deque()
    try:
        for index, item in items:
            waiting.append((index, pool.submit(_load, item, transform), item.target))
            if len(waiting) >= depth:
                first, future, target = waiting.popleft()
                yield first, future.result(), target
        while waiting:
            first, future, target = waiting.popleft()
            yield first, future.result(), target
    finally:
        for _, future, _ in waiting:
            future.cancel()


def _load(item: _Item, transform: Transform) -> torch.Tensor:
    try:
        return transform(Image.fromarray(decode_rgb(item.fetch(), _MAX_PIXELS)))
    except (SampleError, StorageError) as error:
        raise DataError(f"evaluation sample {item.name} cannot be used: {error}") from error


def _pairs(url: str | Source, caption_key: str, csv_fields: CsvFields) -> Iterator[_Item]:
    sources = (url,) if isinstance(url, Source) else expand_sources(url)
    shards = [shard for source in sources for shard in source.urls]
    kind = dataset_type_of("::".join(shards[:1]))
    if kind == "webdataset":
        return _items(_read_shards(shards), lambda raw: caption_of(raw, caption_key))
    captions = CaptionConfig((caption_key,))
    if kind == "folder":
        cut, _ = folder_shards(sources)
        return _items(_read_cut(cut, FolderReader(captions.extensions)), lambda raw: caption_of(raw, caption_key))
    cut, _ = table_shards(sources, csv_fields)
    rows = _read_cut(cut, TableReader(csv_fields, captions.json_fields))
    return _items(rows, lambda raw: caption_of(raw, caption_key if raw.record else "txt"))


def _read_cut(cut: tuple[Source, ...], reader: ShardReader) -> Iterator[RawSample]:
    for source in cut:
        for shard in source.urls:
            try:
                yield from reader.read(shard)
            except ShardError as error:
                raise DataError(f"evaluation set cannot be read: {error}") from error


def _labelled(url: str, split: str) -> Iterator[_Item]:
    if not is_pipe(url) and not url.endswith(".tar"):
        if folders := _class_folders(url):
            return _image_folder(local_path(url), folders)
        return _items(_read_shards(_shards_of(url, split)), _label_of)
    return _items(_read_shards(expand_sources(url)[0].urls), _label_of)


def _items(samples: Iterable[RawSample], target_of: Callable[[RawSample], int | str]) -> Iterator[_Item]:
    for raw in samples:
        name = f"{raw.key!r} of {mask_url(raw.shard)}"
        try:
            # Bound by a default: the closure must not see the next sample.
            yield _Item(name, lambda raw=raw: image_of(raw), target_of(raw))  # type: ignore[misc]
        except SampleError as error:
            raise DataError(f"evaluation sample {name} cannot be used: {error}") from error


def _label_of(raw: RawSample) -> int:
    try:
        return int(raw.fields["cls"])
    except KeyError:
        raise SampleError("no_label", f"no member 'cls'; members: {', '.join(sorted(raw.fields))}") from None
    except ValueError:
        raise SampleError("bad_label", f"{raw.fields['cls'][:40]!r} is no class number") from None


def _read_shards(urls: Iterable[str]) -> Iterator[RawSample]:
    for url in urls:
        try:
            with open_stream(url) as stream:
                yield from read_samples(stream, url)
        except ShardError as error:
            raise DataError(f"evaluation shard cannot be read: {error}") from error


def _shards_of(root: str, split: str) -> list[str]:
    """CLIP_benchmark's numbered tars, else the tars of a local folder or of its `split` folder."""
    count = _read_lines(root, f"{split}/nshards.txt")
    if count:
        return [_join(root, f"{split}/{number}.tar") for number in range(int(count[0]))]
    if is_local(root):
        for folder in (root, _join(root, split)):
            if os.path.isdir(local_path(folder)) and any(
                name.endswith(".tar") for name in os.listdir(local_path(folder))
            ):
                return list(expand_sources(folder)[0].urls)
    raise DataConfigError(
        f"evaluation set {mask_url(root)}: found neither {split}/nshards.txt, nor .tar files, "
        "nor folders of images by class"
    )


def _class_folders(root: str) -> list[str]:
    """Sorted names of the folders that hold pictures; none for remote roots."""
    path = local_path(root)
    if not is_local(root) or not os.path.isdir(path):
        return []
    folders = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    return folders if any(_pictures_below(os.path.join(path, folder)) for folder in folders[:1]) else []


def _image_folder(root: str, folders: list[str]) -> Iterator[_Item]:
    for label, folder in enumerate(folders):
        for path in _pictures_below(os.path.join(root, folder)):
            yield _Item(path, lambda path=path: read_file(path), label)  # type: ignore[misc]


def _pictures_below(folder: str) -> list[str]:
    found = []
    for parent, _, names in sorted(os.walk(folder, followlinks=True)):
        found += [
            os.path.join(parent, name) for name in sorted(names) if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
        ]
    return found


def _join(root: str, name: str) -> str:
    return f"{root.rstrip('/')}/{name}"


def _read_lines(root: str, name: str) -> list[str] | None:
    """The lines of a small text file of the set that hold something, or None when it is not there."""
    if is_pipe(root) or root.endswith(".tar"):
        return None
    try:
        text = read_file(_join(root, name)).decode()
    except StorageError as error:
        if error.kind == "missing":
            return None
        raise DataConfigError(f"evaluation set: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]
