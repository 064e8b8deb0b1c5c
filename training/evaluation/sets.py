"""Sets that were asked for, opened: class names, templates and first samples are checked before a run begins.

Knows no model.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from PIL import Image

from data import (
    CsvConfig,
    DataConfigError,
    EvalBatch,
    StorageError,
    class_folders_of,
    class_names_of,
    is_local,
    is_pipe,
    local_path,
    read_labelled,
    read_lines,
    read_pairs,
    templates_of,
)
from training.config import DataConfig
from training.errors import ConfigError, DataError
from training.evaluation.classifier import DEFAULT_TEMPLATES, check_prompts
from training.evaluation.imagenet import openclip_prompts, readable_names, wnids_of
from training.evaluation.specs import PAIRS, SetSpec

Transform = Callable[[Image.Image], torch.Tensor]

_PROBED = 4


@dataclass(frozen=True)
class LabelledSet:
    """Pictures with labels, and what their classes are called. `has_own_templates`: they came with the set."""

    spec: SetSpec
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    has_own_templates: bool
    split: str = "test"

    def of_split(self, split: str) -> LabelledSet:
        """The same classes, another split of the pictures."""
        return replace(self, split=split)

    def read(self, rank: int, size: int, transform: Transform, batch_size: int, workers: int) -> Iterator[EvalBatch]:
        """This rank's batches. Raises DataError naming what is broken."""
        return read_labelled(self.spec.url, rank, size, transform, batch_size, workers, self.split)

    @property
    def prompts_sha256(self) -> str:
        """A fingerprint of class names and templates: figures under other prompts are other figures."""
        text = "\n".join((*self.classnames, "", *self.templates))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PairSet:
    """Pictures with one or several captions."""

    spec: SetSpec
    caption_key: str
    csv: CsvConfig

    def read(self, rank: int, size: int, transform: Transform, batch_size: int, workers: int) -> Iterator[EvalBatch]:
        """This rank's batches. Raises DataError naming what is broken."""
        return read_pairs(
            self.spec.url,
            *(rank, size, transform),
            batch_size=batch_size,
            workers=workers,
            caption_key=self.caption_key,
            csv_fields=self.csv,
        )


def open_labelled_set(spec: SetSpec, splits: tuple[str, ...] = ("test",)) -> LabelledSet:
    """The set, its first samples of each split read.

    Class names are those of the spec, else of the set (see `data.class_names_of`); WordNet ids, and ImageNet-V2's
    thousand numbers, become names by timm's list. Raises ConfigError or DataConfigError for a set without class names
    or images, for templates without a place for the name, and for labels that do not fit the names.
    """
    with _told_as(spec.where):
        if is_local(spec.url) and not os.path.exists(local_path(spec.url)):
            raise DataConfigError(f"there is no folder {local_path(spec.url)}")
        names, own_templates = _prompts_of(spec)
    templates = tuple(own_templates) or DEFAULT_TEMPLATES
    labelled = LabelledSet(spec, tuple(names), templates, bool(own_templates))
    check_prompts(spec.where, labelled.classnames, templates)
    spec.manifest.check(spec.where, num_classes=len(names))
    for split in splits:
        _probe(labelled.of_split(split))
    _check_same_folders(labelled, splits)
    return labelled


def open_pairs(spec: SetSpec, data: DataConfig) -> PairSet:
    """The set, its first pair read. Raises ConfigError or DataConfigError for one that cannot be used."""
    csv = CsvConfig(data.csv_separator, data.csv_img_key, data.csv_caption_key)
    # --caption-key is how the training set and its validation set are written, not how others are.
    pairs = PairSet(spec, data.caption_key[0] if spec.name == PAIRS else "txt", csv)
    with _told_as(spec.where):
        first = next(pairs.read(0, 1, _no_pixels, 1, 1), None)
    if first is None:
        raise DataConfigError(f"{spec.where}: the set is empty: no pair was found in it")
    return pairs


def _prompts_of(spec: SetSpec) -> tuple[list[str], list[str]]:
    """Class names, and the templates that come with the set, if any do."""
    names = read_lines(spec.classnames) if spec.classnames else class_names_of(spec.url) or []
    templates = read_lines(spec.templates) if spec.templates else templates_of(spec.url) or []
    wnids = wnids_of(names)
    if spec.openclip_prompts:
        # Without ids the classes must be all of them, in their order: names in a file are another spelling of that.
        return openclip_prompts(wnids or wnids_of([str(index) for index in range(len(names))]) or names)
    return readable_names(wnids) if wnids else names, templates


class _told_as:
    """Inside, errors begin with the flag; a DataError is a DataConfigError, unless storage only does not answer."""

    def __init__(self, where: str):
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ConfigError):
            raise ConfigError(f"{self._where}: {error}") from error
        if isinstance(error, DataError):
            # The readers are those of training, and name its flag.
            kind = DataError if _may_come_back(error) else DataConfigError
            raise kind(f"{self._where}: {str(error).removeprefix('--train-data ')}") from error


def _may_come_back(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, StorageError):
        error = error.__cause__
    return error is not None and error.kind == "unreachable"


def _probe(labelled: LabelledSet) -> None:
    where, num_classes = labelled.spec.where, len(labelled.classnames)
    with _told_as(where):
        first = next(labelled.read(0, 1, _no_pixels, _PROBED, 1), None)
        num_folders = len(class_folders_of(labelled.spec.url, labelled.split)) if not is_pipe(labelled.spec.url) else 0
    if first is None:
        raise DataConfigError(f"{where}: the set is empty: no image was found in it")
    assert first.labels is not None
    if num_folders not in (0, num_classes):
        raise DataConfigError(
            f"{where}: {num_classes} names in classnames.txt, but {num_folders} folders of images; each needs "
            "its name, in the order of the sorted folders"
        )
    if int(first.labels.max()) >= num_classes:
        raise DataConfigError(
            f"{where}: label {int(first.labels.max())}, but {num_classes} names in classnames.txt; labels run from "
            f"0 to {num_classes - 1}"
        )


def _check_same_folders(labelled: LabelledSet, splits: tuple[str, ...]) -> None:
    """Of an image folder: a label is a place among the folders, so that those of all splits must be the same."""
    folders = {split: set(class_folders_of(labelled.spec.url, split)) for split in splits if len(splits) > 1}
    for first, second in itertools.combinations(folders, 2):
        if differing := sorted(folders[first] ^ folders[second]):
            raise DataConfigError(
                f"{labelled.spec.where}: the folders of {first} and {second} are not the same classes; "
                f"{differing[0]!r} is in only one of them"
            )


def _no_pixels(image: Image.Image) -> torch.Tensor:
    return torch.empty(0)


__all__ = ["LabelledSet", "PairSet", "open_labelled_set", "open_pairs"]
