"""Retrieval positions, recalls and the loss against short references."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import EvalBatch
from training.errors import DataConfigError
from training.evaluation import retrieval
from training.evaluation.retrieval import LOSS_BLOCK, PairFeatures, blockwise_loss, first_positions


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


class Lookup(nn.Module):
    """Image features are the first pixels, text features rows of a table by their first token."""

    def __init__(self, texts: Tensor):
        super().__init__()
        self.register_buffer("texts", texts)
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> tuple[Tensor | None, ...]:
        images = None if image is None else image[:, 0, 0]
        return images, None if text is None else self.texts[text[:, 0]], self.logit_scale.exp()


def tokenize(texts: list[str]) -> Tensor:
    return torch.tensor([[int(text)] for text in texts])


def batches(images: Tensor, captions: list[str], size: int) -> Iterator[EvalBatch]:
    pixels = images[:, None, None, :].expand(-1, 3, 2, -1)
    for first in range(0, len(captions), size):
        rows = slice(first, first + size)
        yield EvalBatch(pixels[rows], torch.arange(len(captions))[rows], captions=captions[rows])


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_recalls_with_several_captions_equal_a_full_matrix(batch_size: int) -> None:
    images, texts = unit(13, 8), unit(30, 8, seed=1)
    owner = torch.tensor([index % 13 for index in range(30)]).sort().values
    captions = ["\n".join(str(m) for m in range(30) if owner[m] == n) for n in range(13)]
    found = retrieval(Lookup(texts), tokenize, batches(images, captions, batch_size), batch_size, (2, 8))
    nearest_texts, nearest_images = (
        (images @ texts.T).argsort(1, descending=True),
        (texts @ images.T).argsort(1, descending=True),
    )
    for k in (1, 5, 10):
        hits = [n in owner[nearest_texts[n, :k]] for n in range(13)]
        assert found[f"image_to_text_R@{k}"] == pytest.approx(sum(hits) / 13, abs=1e-12)
        hits = [int(owner[m]) in nearest_images[m, :k] for m in range(30)]
        assert found[f"text_to_image_R@{k}"] == pytest.approx(sum(hits) / 30, abs=1e-12)
    assert found["num_samples"] == 13


def test_ranks_count_from_one() -> None:
    images = torch.eye(4)
    found = retrieval(Lookup(torch.eye(4)), tokenize, batches(images, ["0", "1", "2", "3"], 4), 4, (2, 4))
    assert found["image_to_text_mean_rank"] == found["text_to_image_median_rank"] == 1


def test_equal_scores_go_to_the_lower_index() -> None:
    queries, keys = torch.ones(3, 1), torch.ones(3, 1)
    assert first_positions(queries, keys, torch.arange(3), torch.arange(3)).tolist() == [0, 1, 2]


def test_own_other_captions_never_stand_in_the_way() -> None:
    keys = torch.tensor([[0.9], [0.8], [0.7]])
    assert first_positions(torch.ones(1, 1), keys, torch.tensor([0]), torch.tensor([0, 0, 1])).tolist() == [0]


def test_the_loss_is_the_mean_over_blocks_of_a_fixed_size() -> None:
    images, texts = unit(2 * LOSS_BLOCK, 8), unit(2 * LOSS_BLOCK, 8, seed=1)
    pairs = PairFeatures(images, texts, torch.arange(2 * LOSS_BLOCK))
    expected = 0.0
    for half in (slice(0, LOSS_BLOCK), slice(LOSS_BLOCK, None)):
        logits, labels = 7 * images[half].double() @ texts[half].double().T, torch.arange(LOSS_BLOCK)
        expected += float(F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 4
    assert blockwise_loss(pairs, 7) == pytest.approx(expected, rel=1e-12)


def test_with_a_bias_the_loss_is_the_sigmoid_loss() -> None:
    images, texts = unit(5, 8).double(), unit(5, 8, seed=1).double()
    signs = 2 * torch.eye(5) - 1
    expected = -F.logsigmoid(signs * (7 * images @ texts.T - 2)).sum(dim=1).mean()
    assert blockwise_loss(PairFeatures(images, texts, torch.arange(5)), 7, -2) == pytest.approx(
        float(expected), rel=1e-12
    )


def test_an_empty_set_is_an_error() -> None:
    with pytest.raises(DataConfigError, match="empty"):
        retrieval(Lookup(torch.eye(4)), tokenize, iter(()), 4, (2, 4))
