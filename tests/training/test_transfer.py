"""Batches on their way to the device."""

from __future__ import annotations

import pytest
import torch

from data import Batch
from training.transfer import Transfer


def batch(pin: bool = False) -> Batch:
    images = torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8)
    tokens = torch.randint(0, 99, (64, 16))
    draws = {"gray": torch.rand(64) > 0.5}
    if pin:
        images, tokens, draws = images.pin_memory(), tokens.pin_memory(), {"gray": draws["gray"].pin_memory()}
    return Batch(images, tokens, draws, ["k"] * 64, ["s"] * 64)


def test_on_the_cpu_nothing_is_copied() -> None:
    given = batch()
    got = Transfer(torch.device("cpu"))(given)
    assert got.images is given.images
    assert got.tokens is given.tokens


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_busy_gpu_sees_every_batch_complete() -> None:
    device = torch.device("cuda")
    transfer, ballast = Transfer(device), torch.randn(2048, 2048, device=device)
    for _ in range(20):
        given = batch(pin=True)
        for _ in range(10):
            ballast = (ballast @ ballast).clamp(-1, 1)
        got = transfer(given)
        total = got.images.long().sum() + got.tokens.sum() + got.draws["gray"].sum()
        assert int(total) == int(given.images.long().sum() + given.tokens.sum() + given.draws["gray"].sum())
