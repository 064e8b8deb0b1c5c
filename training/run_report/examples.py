"""What a run's newest model finds: nearest images of captions, nearest captions of images, guesses at classes.

Only the first samples of a set are looked at. Pictures are kept as the image tower sees them. Knows no HTML.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import models
from data import EvalBatch
from training.config import DataConfig
from training.distributed import World
from training.errors import DataError
from training.evaluation.classifier import build_classifier
from training.evaluation.features import Tokenize, encode_images, encode_texts, evaluating
from training.evaluation.sets import LabelledSet, PairSet, open_labelled_set, open_pairs
from training.evaluation.specs import RETRIEVAL, ZEROSHOT, SetSpec

NEAREST = 5
_BATCH = 32
_WORKERS = 4
_THUMBNAIL_PIXELS = 144
_JPEG_QUALITY = 82


@dataclass(frozen=True)
class Hit:
    """A thing that was found: its number in the set, and the cosine of the angle to what was asked for."""

    index: int
    score: float
    is_right: bool


@dataclass(frozen=True)
class Query:
    """What was asked for, what is nearest, and the place of the first right one, from 1."""

    index: int
    hits: tuple[Hit, ...]
    right: Hit
    rank: int


@dataclass(frozen=True)
class PairExamples:
    """Of the first samples of a set of pairs: `by_caption` finds images, `by_image` captions."""

    label: str
    pictures: tuple[bytes, ...]
    captions: tuple[str, ...]
    owner: tuple[int, ...]  # the image of each caption
    by_caption: tuple[Query, ...]
    by_image: tuple[Query, ...]


@dataclass(frozen=True)
class Guess:
    """A picture of a labelled set, its class, and the likeliest classes with their share of the softmax."""

    picture: bytes
    right: str
    guesses: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class ClassExamples:
    """Of the first samples of a labelled set."""

    label: str
    num_classes: int
    num_samples: int
    guesses: tuple[Guess, ...]


@dataclass(frozen=True)
class Examiner:
    """A model with what it needs to look at a set. pool: samples of a set that are looked at; count: examples shown."""

    model: models.CLIP
    tokenizer: Tokenize
    preprocess: models.InferenceTransform
    world: World
    pool: int = 1000
    count: int = 8

    def look(self, spec: SetSpec, data: DataConfig) -> PairExamples | ClassExamples:
        """The examples of one set. Raises ConfigError, DataConfigError or DataError."""
        assert spec.kind in (RETRIEVAL, ZEROSHOT), spec.kind
        with evaluating(self.model, self.world):
            if spec.kind == RETRIEVAL:
                return self._pairs(spec, open_pairs(spec, data))
            return self._classes(spec, open_labelled_set(spec))

    def _pairs(self, spec: SetSpec, pairs: PairSet) -> PairExamples:
        features, pictures, batches = self._images(pairs)
        groups = [_lines(text) for batch in batches for text in batch.captions or []]
        captions = [line for group in groups for line in group]
        owner = torch.tensor([index for index, group in enumerate(groups) for _ in group])
        texts = self._texts(captions)
        chosen = spread(len(features), self.count)
        first = torch.searchsorted(owner, torch.tensor(chosen))
        image = torch.arange(len(features))
        return PairExamples(
            spec.label,
            tuple(pictures),
            tuple(captions),
            tuple(owner.tolist()),
            tuple(nearest(texts, features, owner, image, first.tolist())),
            tuple(nearest(features, texts, image, owner, chosen)),
        )

    def _classes(self, spec: SetSpec, labelled: LabelledSet) -> ClassExamples:
        features, pictures, batches = self._images(labelled)
        labels = torch.cat([batch.labels for batch in batches if batch.labels is not None]).tolist()
        names = labelled.classnames
        classifier = build_classifier(self.model, self.tokenizer, names, labelled.templates, "fp32", self.world).cpu()
        shares = (float(self.model.logit_scale.exp()) * features @ classifier).softmax(dim=-1)
        best = shares.topk(min(NEAREST, len(names)))
        guesses = [
            Guess(
                pictures[index],
                names[labels[index]],
                tuple((names[int(c)], float(p)) for c, p in zip(best.indices[index], best.values[index], strict=True)),
            )
            for index in spread(len(features), self.count)
        ]
        return ClassExamples(spec.label, len(names), len(features), tuple(guesses))

    def _images(self, opened: PairSet | LabelledSet) -> tuple[Tensor, list[bytes], list[EvalBatch]]:
        """Features [N, E], JPEG files, and the batches without their pixels, of the first samples."""
        features, pictures, batches = [], [], []
        # The pixels before normalisation serve both the tower and the page.
        for batch in first_samples(opened.read, self.preprocess.resize, self.pool):
            pixels = models.preprocess.normalize(batch.images, self.preprocess.config)
            features.append(encode_images(self.model, pixels, "fp32", self.world).cpu())
            pictures += [thumbnail(image) for image in batch.images]
            batches.append(EvalBatch(torch.empty(0), batch.indices, batch.labels, batch.captions))
        if not features:
            raise DataError("the set is empty")
        return torch.cat(features), pictures, batches

    def _texts(self, captions: Sequence[str]) -> Tensor:
        parts = [captions[first : first + _BATCH] for first in range(0, len(captions), _BATCH)]
        tokens = [self.tokenizer(list(part)) for part in parts]
        return torch.cat([encode_texts(self.model, ids, "fp32", self.world).cpu() for ids in tokens])


def first_samples(
    read: Callable[..., Any], transform: Callable[[Image.Image], Tensor], pool: int
) -> Iterator[EvalBatch]:
    """Batches of the first `pool` samples of a set, and no more; the reader is closed behind them."""
    left = pool
    with closing(read(0, 1, transform, _BATCH, _WORKERS)) as batches:
        for batch in batches:
            size = min(left, len(batch.images))
            captions = None if batch.captions is None else batch.captions[:size]
            labels = None if batch.labels is None else batch.labels[:size]
            yield EvalBatch(batch.images[:size], batch.indices[:size], labels, captions)
            left -= size
            if not left:
                return


def nearest(
    queries: Tensor, keys: Tensor, query_group: Tensor, key_group: Tensor, chosen: Sequence[int]
) -> Iterator[Query]:
    """For each chosen query [N, E] the keys [M, E] by falling cosine, equal ones by place. Its group is right."""
    for index in chosen:
        scores = keys @ queries[index]
        order = scores.argsort(descending=True, stable=True)
        is_right = key_group[order] == query_group[index]
        first = int(is_right.int().argmax())
        hits = [
            Hit(int(order[k]), float(scores[order[k]]), bool(is_right[k]))
            for k in (*range(NEAREST), first)
            if k < len(order)
        ]
        yield Query(index, tuple(hits[:-1]), hits[-1], first + 1)


def spread(length: int, count: int) -> list[int]:
    """Up to `count` indices, evenly over a set of `length`."""
    count = min(count, length)
    return [index * length // count for index in range(count)]


def thumbnail(pixels: Tensor) -> bytes:
    """uint8 [3, H, W] as a small JPEG file."""
    image = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
    image.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    written = io.BytesIO()
    image.save(written, "JPEG", quality=_JPEG_QUALITY)
    return written.getvalue()


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()] or [text]
