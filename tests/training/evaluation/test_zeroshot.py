"""Zero-shot figures: integer counts over all images, whatever the batches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from data import EvalBatch
from training.errors import DataConfigError
from training.evaluation import Stopped, zeroshot


class FirstPixels(nn.Module):
    """A "tower" whose feature is the first row of pixels: the test decides the logits."""

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> tuple[Tensor | None, ...]:
        assert image is not None
        return image[:, 0, 0], None, torch.ones(())


def batches(logits: Tensor, labels: list[int], size: int) -> Iterator[EvalBatch]:
    images = logits[:, None, None, :].expand(-1, 3, 2, -1)
    for first in range(0, len(labels), size):
        rows = slice(first, first + size)
        indices = torch.arange(len(labels))[rows]
        yield EvalBatch(images[rows], indices, torch.tensor(labels[rows]))


def reference(logits: Tensor, labels: list[int]) -> dict[str, float]:
    order = logits.argsort(dim=1, descending=True).tolist()
    hits = [label == row[0] for row, label in zip(order, labels, strict=True)]
    by_class = {
        label: [hit for hit, other in zip(hits, labels, strict=True) if other == label] for label in set(labels)
    }
    return {
        "top1": sum(hits) / len(hits),
        "top5": sum(label in row[:5] for row, label in zip(order, labels, strict=True)) / len(hits),
        "mean_per_class_recall": sum(sum(hits) / len(hits) for hits in by_class.values()) / len(by_class),
    }


@pytest.mark.parametrize("batch_size", [1, 4, 23, 64])
def test_figures_equal_a_count_by_hand_for_any_batch_size(batch_size: int) -> None:
    logits = torch.randn(23, 9, generator=torch.Generator().manual_seed(1))
    labels = [index % 7 for index in range(23)]
    found = zeroshot(FirstPixels(), torch.eye(9), batches(logits, labels, batch_size), batch_size, (2, 9))
    assert (found["num_samples"], found["num_classes"]) == (23, 7)
    for name, value in reference(logits, labels).items():
        assert found[name] == pytest.approx(value, abs=1e-12)


def test_with_fewer_than_five_classes_top5_counts_all() -> None:
    found = zeroshot(FirstPixels(), torch.eye(3), batches(torch.randn(4, 3), [0, 1, 2, 0], 4), 4, (2, 3))
    assert found["top5"] == 1


def test_a_label_beyond_the_class_names_is_named() -> None:
    with pytest.raises(DataConfigError, match="sample 2 of the set has label 5, but there are 3 class names"):
        zeroshot(FirstPixels(), torch.eye(3), batches(torch.randn(4, 3), [0, 1, 5, 0], 4), 4, (2, 3))


def test_an_empty_set_is_an_error_and_not_a_score() -> None:
    with pytest.raises(DataConfigError, match="empty"):
        zeroshot(FirstPixels(), torch.eye(3), iter(()), 4, (2, 3))


def test_a_request_to_stop_ends_it_between_two_batches() -> None:
    answers = iter([False, True])
    stream = batches(torch.randn(9, 3), [0] * 9, 3)
    with pytest.raises(Stopped):
        zeroshot(FirstPixels(), torch.eye(3), stream, 3, (2, 3), should_stop=lambda: next(answers))
