"""The labelled sets of an evaluation: their class names and templates, checked before a run begins. Knows no model."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from PIL import Image

from data import DataConfigError, EvalBatch, class_names_of, is_local, local_path, read_labelled, templates_of
from training.errors import ConfigError, DataError
from training.evaluation.classifier import DEFAULT_TEMPLATES, check_prompts

Transform = Callable[[Image.Image], torch.Tensor]

IMAGENET_METRIC = "imagenet-zeroshot-val"
_WNID = re.compile(r"n\d{8}")
_PROBED = 4


@dataclass(frozen=True)
class LabelledSet:
    """`metric` is what its figures are called, without the figure: `val/<metric>-top1`."""

    name: str
    metric: str
    url: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]

    def read(self, rank: int, size: int, transform: Transform, batch_size: int, workers: int) -> Iterator[EvalBatch]:
        """This rank's batches. Raises DataError naming what is broken."""
        return read_labelled(self.url, rank, size, transform, batch_size, workers)


def open_labelled_set(spec: str) -> LabelledSet:
    """The set of one `--zeroshot-data name=folder`, its first samples read.

    Raises ConfigError or DataConfigError for a set without class names, templates or images, or with labels
    that do not fit the names.
    """
    name, url = split_name(spec, "--zeroshot-data")
    where = f"--zeroshot-data {spec}"
    with _told_as(where):
        names = class_names_of(url) or []
        templates = templates_of(url) or list(DEFAULT_TEMPLATES)
    labelled = LabelledSet(name, f"{name}-zeroshot", url, tuple(names), tuple(templates))
    _check(labelled, where)
    return labelled


def open_imagenet(url: str) -> LabelledSet:
    """ImageNet's validation set from `--imagenet-val`: folders by WordNet id, or CLIP_benchmark's layout.

    Class names come from `classnames.txt` in the folder, else from timm's list. Raises as `open_labelled_set`.
    """
    where = f"--imagenet-val {url}"
    with _told_as(where):
        names = class_names_of(url) or []
        templates = templates_of(url) or list(DEFAULT_TEMPLATES)
    if names and all(_WNID.fullmatch(name) for name in names):
        names = imagenet_names(names)
    labelled = LabelledSet("imagenet", IMAGENET_METRIC, url, tuple(names), tuple(templates))
    _check(labelled, where)
    return labelled


def imagenet_names(wnids: list[str]) -> list[str]:
    """A name for each WordNet id: the first of its synonyms, all of them where classes share the first."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    known = set(info.label_names())
    for wnid in wnids:
        if wnid not in known:
            raise ConfigError(f"--imagenet-val: {wnid} is none of the 1000 classes; give the names in classnames.txt")
    synonyms = {wnid: info.label_name_to_description(wnid) for wnid in known}
    shared = Counter(text.split(",")[0] for text in synonyms.values())
    return [synonyms[w] if shared[synonyms[w].split(",")[0]] > 1 else synonyms[w].split(",")[0] for w in wnids]


def split_name(spec: str, flag: str) -> tuple[str, str]:
    """'name=folder' to both; the folder's own name where none is given. Raises ConfigError."""
    name, separator, url = spec.partition("=")
    # A URL may hold an equals sign of its own: what stands before it is a name only without a slash.
    if not separator or "/" in name:
        url = spec
        name = os.path.basename(spec.rstrip("/"))
    if not url or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ConfigError(f"{flag} {spec}: write name=folder, the name in letters, digits, '_', '-' and '.'")
    return name, url


class _told_as:
    """Inside, a DataError becomes a DataConfigError that begins with the flag."""

    def __init__(self, where: str):
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, DataError):
            raise DataConfigError(f"{self._where}: {error}") from error


def _check(labelled: LabelledSet, where: str) -> None:
    if is_local(labelled.url) and not os.path.isdir(local_path(labelled.url)):
        raise DataConfigError(f"{where}: there is no folder {local_path(labelled.url)}")
    check_prompts(where, labelled.classnames, labelled.templates)
    with _told_as(where):
        first = next(labelled.read(0, 1, _no_pixels, _PROBED, 1), None)
    if first is None:
        raise DataConfigError(f"{where}: the set is empty: no image was found in it")
    assert first.labels is not None
    num_classes, num_folders = len(labelled.classnames), _num_class_folders(labelled.url)
    if num_folders not in (None, num_classes):
        raise DataConfigError(
            f"{where}: {num_classes} names in classnames.txt, but {num_folders} folders of images; each needs "
            "its name, in the order of the sorted folders"
        )
    if int(first.labels.max()) >= num_classes:
        raise DataConfigError(
            f"{where}: label {int(first.labels.max())}, but {num_classes} names in classnames.txt; labels run from "
            f"0 to {num_classes - 1}"
        )


def _no_pixels(image: Image.Image) -> torch.Tensor:
    return torch.empty(0)


def _num_class_folders(url: str) -> int | None:
    """Folders of an image folder; None for sets of shards."""
    if not is_local(url) or os.path.exists(os.path.join(local_path(url), "test", "nshards.txt")):
        return None
    folders = [entry.path for entry in os.scandir(local_path(url)) if entry.is_dir()]
    holds_shards = any(name.endswith(".tar") for folder in [local_path(url), *folders] for name in os.listdir(folder))
    return None if holds_shards or not folders else len(folders)
