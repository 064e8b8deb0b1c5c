"""The streamed loss and its gradients against ten lines of fp64, on one process and on several."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import training.loss as loss_module
from tests.helpers.gloo import gloo_group, run_ranks
from training.loss import contrastive_loss, dense_loss

B, E = 6, 16


def _features(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    image, text = torch.randn(2, rows, E, generator=generator)
    return F.normalize(image, dim=1), F.normalize(0.7 * image + text, dim=1)


def _reference(image: Tensor, text: Tensor, scale: float) -> list[Tensor]:
    """Value and gradients of the definition in fp64: cross-entropy over rows and over columns."""
    leaves = [
        image.double().requires_grad_(),
        text.double().requires_grad_(),
        torch.tensor(scale).double().requires_grad_(),
    ]
    logits = leaves[2] * leaves[0] @ leaves[1].T
    rows, columns = logits.log_softmax(1).diagonal(), logits.log_softmax(0).diagonal()
    value = -(rows.mean() + columns.mean()) / 2
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def _relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


def _errors_on_rank(scale: float, local_loss: bool, block_elements: int) -> list[float]:
    """Relative errors of loss, image, text and scale gradients, averaged over ranks as DDP averages."""
    loss_module._BLOCK_ELEMENTS = block_elements
    with gloo_group() as (rank, world):
        image, text = _features(B * world)
        expected = _reference(image, text, scale)
        own = slice(rank * B, (rank + 1) * B)
        leaves = [
            image[own].clone().requires_grad_(),
            text[own].clone().requires_grad_(),
            torch.tensor(scale, requires_grad=True),
        ]
        value = contrastive_loss(*leaves, local_loss=local_loss)
        value.backward()
        means = torch.stack([value.detach(), leaves[2].grad])
        dist.all_reduce(means)
        got = [means[0] / world, leaves[0].grad / world, leaves[1].grad / world, means[1] / world]
        return [
            _relative_error(a, b)
            for a, b in zip(got, [expected[0], expected[1][own], expected[2][own], expected[3]], strict=True)
        ]


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("block_elements", [1 << 24, 13])
def test_the_streamed_loss_and_its_gradients_equal_the_fp64_definition(
    monkeypatch: pytest.MonkeyPatch, scale: float, block_elements: int
) -> None:
    monkeypatch.setattr(loss_module, "_BLOCK_ELEMENTS", block_elements)
    image, text = _features(64)
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_(), torch.tensor(scale, requires_grad=True)]
    value = contrastive_loss(*leaves)
    value.backward()
    expected = _reference(image, text, scale)
    for got, want in zip([value.detach(), *(leaf.grad for leaf in leaves)], expected, strict=True):
        assert _relative_error(got, want) < 1e-5


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("local_loss", [True, False])
def test_any_number_of_ranks_gives_the_global_loss_and_gradient(world: int, local_loss: bool) -> None:
    for errors in run_ranks(_errors_on_rank, world, 100.0, local_loss, 1 << 24):
        assert max(errors) < 1e-5


def test_a_block_that_holds_only_a_part_of_the_diagonal_is_right_on_every_rank() -> None:
    for errors in run_ranks(_errors_on_rank, 2, 14.3, True, 5 * B):
        assert max(errors) < 1e-5


def test_opposite_features_at_the_largest_scale_stay_finite() -> None:
    image = F.normalize(torch.ones(4, E), dim=1).requires_grad_()
    value = contrastive_loss(image, -image.detach(), torch.tensor(100.0))
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(image.grad).all()


def test_autocast_around_the_loss_does_not_reach_its_arithmetic() -> None:
    image, text = _features(32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = contrastive_loss(image, text, torch.tensor(100.0))
    assert torch.equal(inside, contrastive_loss(image, text, torch.tensor(100.0)))


def test_dense_loss_is_the_definition() -> None:
    image, text = _features(16)
    value = dense_loss(image.double(), text.double(), torch.tensor(14.3, dtype=torch.float64))
    assert _relative_error(value, _reference(image, text, 14.3)[0]) < 1e-6
