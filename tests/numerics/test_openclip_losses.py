"""Our losses equal OpenCLIP's on one process: values, and gradients of features, temperature and bias."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.numerics.exact import features
from training.losses import caption_loss, contrastive_loss, distillation_loss, sigmoid_loss
from training.losses.distill import Similarities

pytestmark = pytest.mark.parity
pytest.importorskip("open_clip", reason="compares with open_clip_torch")


def _inputs() -> list[Tensor]:
    image, text = features("random", 32, 16)
    return [t.clone().requires_grad_() for t in (image, text, torch.tensor(14.3), torch.tensor(-10.0))]


def _assert_equal(ours: Tensor, theirs: Tensor, leaves: list[Tensor], their_leaves: list[Tensor]) -> None:
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    for own, their in zip(leaves, their_leaves, strict=True):
        torch.testing.assert_close(own.grad, their.grad, rtol=1e-4, atol=1e-7)


def test_the_contrastive_loss_is_clip_loss() -> None:
    from open_clip.loss import ClipLoss

    ours, theirs = _inputs()[:3], _inputs()[:3]
    _assert_equal(contrastive_loss(*ours), ClipLoss()(*theirs), ours, theirs)


def test_the_sigmoid_loss_is_siglip_loss() -> None:
    from open_clip.loss import SigLipLoss

    ours, theirs = _inputs(), _inputs()
    _assert_equal(sigmoid_loss(*ours), SigLipLoss()(*theirs), ours, theirs)


def test_the_distillation_loss_is_that_of_distill_clip_loss() -> None:
    from open_clip.loss import DistillClipLoss

    ours, theirs = _inputs()[:3], _inputs()[:3]
    teacher = (*features("shuffled", 32, 24), torch.tensor(30.0))
    value = DistillClipLoss()(*theirs, *teacher, output_dict=True)["distill_loss"]
    _assert_equal(distillation_loss(Similarities(*ours), Similarities(*teacher)), value, ours, theirs)


def test_the_caption_loss_is_that_of_coca_loss() -> None:
    from open_clip.loss import CoCaLoss

    tokens = torch.randint(1, 40, (4, 9), generator=torch.Generator().manual_seed(0))
    tokens[:, 6:] = 0
    ours, theirs = (
        torch.randn(4, 8, 40, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)
    )
    unused = torch.zeros(4, 1), torch.zeros(4, 1)
    loss = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=0)
    value = loss(*unused, theirs, tokens[:, 1:], torch.tensor(1.0), output_dict=True)["caption_loss"]
    _assert_equal(caption_loss(ours, tokens), value, [ours], [theirs])
