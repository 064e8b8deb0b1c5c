"""Zero-shot classification: the share of images whose nearest class is the right one. Knows no files and no prompts."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from data import EvalBatch
from training.distributed import World
from training.evaluation.features import encode_images, evaluating
from training.evaluation.feed import ShouldStop, filled, in_step, with_checked_labels
from training.evaluation.hits import count_hits, figures_of, no_hits


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
    counts = no_hits(num_classes)
    with evaluating(model, world):
        for batch in in_step(with_checked_labels(batches, num_classes), world, should_stop):
            images = filled(None if batch is None else batch.images, batch_size, image_size)
            logits = encode_images(model, images, precision, world) @ classifier
            if batch is not None:
                assert batch.labels is not None
                counts += count_hits(logits[: len(batch.images)], batch.labels)
    return figures_of(counts, world)
