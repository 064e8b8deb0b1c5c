"""Zero-shot classification: the share of images whose nearest class is the right one. Knows no files and no prompts.

Every rank counts hits as integers, and integers are summed: the figures are exact for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from data import EvalBatch
from training.distributed import World
from training.errors import DataConfigError
from training.evaluation.features import encode_images, evaluating
from training.evaluation.feed import ShouldStop, filled, in_step

_TOP = 5


def zeroshot(
    model: nn.Module,
    classifier: Tensor,
    batches: Iterator[EvalBatch],
    batch_size: int,
    image_size: tuple[int, int],
    precision: str = "fp32",
    world: World | None = None,
    should_stop: ShouldStop | None = None,
) -> dict[str, float]:
    """Figures of the whole set in [0, 1]: top1, top5, mean_per_class_recall over the classes that have images.

    With fewer than five classes, top5 counts all of them. Also `num_samples` and `num_classes`, those with images.
    classifier: [E, C]. batches: this rank's labelled ones, of up to `batch_size` rows. Collective.
    Raises DataConfigError for an empty set or a label outside the classes, Stopped when asked to stop.
    """
    world = world or World()
    num_classes = classifier.shape[1]
    counts = torch.zeros(3, num_classes, dtype=torch.int64)  # images, top-1 hits, top-5 hits, by class
    with evaluating(model, world):
        for batch in in_step(_checked(batches, num_classes), world, should_stop):
            images = filled(None if batch is None else batch.images, batch_size, image_size)
            logits = encode_images(model, images, precision, world) @ classifier
            if batch is not None:
                assert batch.labels is not None
                counts += _count(logits[: len(batch.images)], batch.labels)
    return _figures(torch.stack(world.all_gather_object(counts)).sum(dim=0))


def _checked(batches: Iterator[EvalBatch], num_classes: int) -> Iterator[EvalBatch]:
    """The batches; DataConfigError at the first label that no class name belongs to."""
    for batch in batches:
        assert batch.labels is not None
        wrong = (batch.labels < 0) | (batch.labels >= num_classes)
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise DataConfigError(
                f"sample {int(batch.indices[first])} of the set has label {int(batch.labels[first])}, but there are "
                f"{num_classes} class names: labels run from 0 to {num_classes - 1}, in the order of the names"
            )
        yield batch


def _count(logits: Tensor, labels: Tensor) -> Tensor:
    """[3, C]"""
    num_classes = logits.shape[1]
    nearest = logits.topk(min(_TOP, num_classes), dim=1).indices.cpu()
    hits = nearest == labels[:, None]
    rows = (torch.ones_like(labels), hits[:, 0].long(), hits.any(dim=1).long())
    return torch.stack([torch.zeros(num_classes, dtype=torch.int64).index_add_(0, labels, row) for row in rows])


def _figures(counts: Tensor) -> dict[str, float]:
    images, top1, top5 = counts.double()
    total = images.sum()
    if total == 0:
        raise DataConfigError("the set is empty: no image was found in it")
    shown = images > 0
    return {
        "top1": float(top1.sum() / total),
        "top5": float(top5.sum() / total),
        "mean_per_class_recall": float((top1[shown] / images[shown]).mean()),
        "num_samples": float(total),
        "num_classes": float(shown.sum()),
    }
