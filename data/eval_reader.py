"""Evaluation sets, exactly: every sample once over all ranks, in a fixed order, nothing padded or dropped.

Rank r of w reads the samples whose number leaves r when divided by w. Formats: tars as CLIP_benchmark lays
them out (`test/nshards.txt`, `test/0.tar`..., `classnames.txt`, `zeroshot_classification_templates.txt`), a
folder or list of tars, an image folder with one folder a class (below `test/` or not), a CSV of pictures and labels,
lists and folders of pairs. A picture that cannot be decoded is an error here: a score over fewer samples is another.
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
from data.eval_layout import (
    check_split,
    class_folders,
    image_root,
    is_folder,
    is_number,
    numbered_shards,
    pictures_below,
    shards_of,
    text_lines,
)
from data.files import read_file
from data.folder_source import FolderReader, folder_shards
from data.prepare import image_of
from data.readers import ShardReader
from data.rows import CsvConfig, CsvFields
from data.samples import RawSample, SampleError
from data.storage import open_stream
from data.table import TableReader, table_shards
from data.tar import read_samples
from data.urls import Source, dataset_type_of, expand_sources, is_local, is_pipe, local_path, mask_url

Transform = Callable[[Image.Image], torch.Tensor]
Tokenize = Callable[[list[str]], torch.Tensor]

_CLASS_NAMES = "classnames.txt"
_TEMPLATES = "zeroshot_classification_templates.txt"
_LABELS = "label"
_LISTS = (".csv", ".tsv")
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
    """This rank's batches of an image-caption set: any form of `--train-data`, or a folder in CLIP_benchmark's layout.

    `workers` threads decode and transform. Raises DataError when the set is not there, or naming the sample when a
    picture or caption is missing or broken; DataConfigError for files that make no sense.
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
    """This rank's batches of an image-label set: CLIP_benchmark's layout, tars with `.cls`, an image folder, or a list.

    In an image folder a class's label is the place of its folder in sorted order, or the folder's number where all
    are numbers. A CSV has the columns `filepath` and `label`, a number or a class name. Raises as `read_pairs`.
    """
    for batch, labels in _batches(_labelled(url, split), rank, world_size, transform, batch_size, workers):
        batch.labels = torch.tensor([int(label) for label in labels], dtype=torch.int64)
        yield batch


def class_names_of(url: str) -> list[str] | None:
    """Names of the classes in label order: `classnames.txt`, else the folders of an image folder, else None.

    Of a CSV: that file beside it, else its labels in alphabetical order, unless they are numbers.
    """
    if (names := text_lines(_folder_of(url), _CLASS_NAMES)) is not None:
        return names
    if url.endswith(_LISTS):
        labels = {raw.fields["txt"].decode() for raw in _rows(url)}
        return None if all(is_number(label) for label in labels) else sorted(labels)
    return class_folders_of(url) or None


def templates_of(url: str) -> list[str] | None:
    """Prompt templates with `{c}` for the class, from `zeroshot_classification_templates.txt`; None without it."""
    lines = text_lines(_folder_of(url), _TEMPLATES)
    return None if lines is None else [line for line in lines if line]


def read_lines(url: str) -> list[str]:
    """The lines of a small text file but empty ones at its end. DataConfigError when it is not there."""
    folder, _, name = url.rpartition("/")
    lines = text_lines(folder or ("/" if url.startswith("/") else "."), name)
    if lines is None:
        raise DataConfigError(f"{mask_url(url)}: there is no such file")
    return lines


def class_folders_of(url: str, split: str = "test") -> list[str]:
    """The folders of an image folder that are its classes, in label order; none for other kinds of sets."""
    if not is_local(url) or url.endswith(_LISTS) or text_lines(url, f"{split}/nshards.txt") is not None:
        return []
    return class_folders(image_root(url, split))


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
    if isinstance(url, str) and is_folder(url) and (numbered := numbered_shards(url, "test")):
        return _items(_read_shards(numbered), lambda raw: caption_of(raw, caption_key))
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
    check_split(url, split)
    if url.endswith(_LISTS):
        names = class_names_of(url) or []
        return _items(_rows(url), lambda raw: _label_in_list(raw, names))
    if not is_pipe(url) and not url.endswith(".tar"):
        if folders := class_folders_of(url, split):
            return _image_folder(local_path(image_root(url, split)), folders)
        return _items(_read_shards(shards_of(url, split)), _label_of)
    return _items(_read_shards(expand_sources(url)[0].urls), _label_of)


def _rows(url: str) -> Iterator[RawSample]:
    """The rows of a labelled list: the label is where the caption is in other lists."""
    header = read_file(url).partition(b"\n")[0]
    config = CsvConfig("\t" if b"\t" in header else ",", csv_caption_key=_LABELS)
    cut, _ = table_shards(expand_sources(url), config)
    return _read_cut(cut, TableReader(config))


def _label_in_list(raw: RawSample, names: list[str]) -> int:
    label = raw.fields["txt"].decode().strip()
    if is_number(label):
        return int(label)
    if label not in names:
        raise SampleError("bad_label", f"{label[:40]!r} is neither a number nor one of the {len(names)} class names")
    return names.index(label)


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
        several = " (npy: a set with several labels an image cannot be scored)" if "npy" in raw.fields else ""
        raise SampleError("no_label", f"no member 'cls'; members: {', '.join(sorted(raw.fields))}{several}") from None
    except ValueError:
        raise SampleError("bad_label", f"{raw.fields['cls'][:40]!r} is no class number") from None


def _read_shards(urls: Iterable[str]) -> Iterator[RawSample]:
    for url in urls:
        try:
            with open_stream(url) as stream:
                yield from read_samples(stream, url)
        except ShardError as error:
            raise DataError(f"evaluation shard cannot be read: {error}") from error


def _folder_of(url: str) -> str:
    """Where the text files of a set are."""
    return (url.rpartition("/")[0] or ".") if url.endswith(_LISTS) else url


def _image_folder(root: str, folders: list[str]) -> Iterator[_Item]:
    for label, folder in enumerate(folders):
        for path in pictures_below(os.path.join(root, folder)):
            yield _Item(path, lambda path=path: read_file(path), label)  # type: ignore[misc]
