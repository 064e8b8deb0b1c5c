"""Hits of a classifier by class, as integers: summed over ranks, figures are exact for any number of them."""

from __future__ import annotations

import torch
from torch import Tensor

from training.distributed import World
from training.errors import DataConfigError

_TOP = 5


def no_hits(num_classes: int) -> Tensor:
    """The counts [3, C] of nothing yet: images, top-1 hits, top-5 hits, by class."""
    return torch.zeros(3, num_classes, dtype=torch.int64)


def count_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """The counts [3, C] of some images: logits [B, C], labels int64 [B] on the host."""
    num_classes = logits.shape[1]
    nearest = logits.topk(min(_TOP, num_classes), dim=1).indices.cpu()
    hits = nearest == labels[:, None]
    rows = (torch.ones_like(labels), hits[:, 0].long(), hits.any(dim=1).long())
    return torch.stack([torch.zeros(num_classes, dtype=torch.int64).index_add_(0, labels, row) for row in rows])


def figures_of(counts: Tensor, world: World) -> dict[str, float]:
    """Figures in [0, 1] from every rank's counts [3, C]: top1, top5, mean_per_class_recall. Collective.

    The recall is the mean over the classes that have images; `recall_standard_error` is that of the mean, were the
    classes given and their images drawn. Also `num_samples` and `num_classes`, those with images.
    Raises DataConfigError when no rank has counted an image.
    """
    images, top1, top5 = torch.stack(world.all_gather_object(counts)).sum(dim=0).double()
    total = images.sum()
    if total == 0:
        raise DataConfigError("the set is empty: no image was found in it")
    shown = images > 0
    recalls = top1[shown] / images[shown]
    return {
        "top1": float(top1.sum() / total),
        "top5": float(top5.sum() / total),
        "mean_per_class_recall": float(recalls.mean()),
        "recall_standard_error": float((recalls * (1 - recalls) / images[shown]).sum().sqrt() / len(recalls)),
        "num_samples": float(total),
        "num_classes": float(shown.sum()),
    }
