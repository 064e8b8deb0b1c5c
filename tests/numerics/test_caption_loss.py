"""The caption loss against torch's cross-entropy: values, gradients, chunks, padding, ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.gloo import gloo_group, run_ranks
from training.losses import caption, caption_loss

B, L, V = 4, 7, 50


def _captions(rows: int = B) -> tuple[Tensor, Tensor]:
    """Logits [rows, L, V] and tokens [rows, L + 1] whose captions have 2, 3, ... tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, V, (rows, L + 1), generator=generator)
    tokens[torch.arange(L + 1)[None] >= torch.arange(rows)[:, None] + 2] = 0
    return 5 * torch.randn(rows, L, V, generator=generator), tokens


def _reference(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    exact = logits.double().requires_grad_()
    value = 2 * F.cross_entropy(exact.permute(0, 2, 1), tokens[:, 1:], ignore_index=0)
    value.backward()
    return value.detach(), exact.grad


@pytest.mark.parametrize("chunk", [1, 3 * V, 1 << 22])
def test_value_and_gradient_are_those_of_cross_entropy(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(caption, "CHUNK_ELEMENTS", chunk)
    logits, tokens = _captions()
    before = logits.clone()
    value = caption_loss(logits.requires_grad_(), tokens)
    value.backward()
    want, grad = _reference(logits.detach(), tokens)
    torch.testing.assert_close(value.detach().double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad.double(), grad, rtol=1e-5, atol=1e-8)
    assert torch.equal(logits.detach(), before)


def test_logits_in_bf16_are_summed_in_fp32_and_get_a_gradient_of_their_own_type() -> None:
    logits, tokens = _captions()
    logits = logits.bfloat16().requires_grad_()
    value = caption_loss(logits, tokens)
    value.backward()
    want, grad = _reference(logits.detach(), tokens)
    torch.testing.assert_close(value.detach().double(), want, rtol=1e-6, atol=0)
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.double(), grad, rtol=1e-2, atol=1e-6)


def test_tokens_are_one_longer_than_the_logits() -> None:
    logits, tokens = _captions()
    with pytest.raises(ValueError, match="one token more"):
        caption_loss(logits, tokens[:, :-1])


def _on_rank() -> tuple[float, Tensor]:
    with gloo_group() as (rank, world):
        logits, tokens = _captions(2 * B)
        own = logits[rank * B : (rank + 1) * B].clone().requires_grad_()
        value = caption_loss(own, tokens[rank * B : (rank + 1) * B])
        value.backward()
        mean = value.detach() / world
        dist.all_reduce(mean)
        return float(mean), own.grad / world


def test_ranks_with_longer_captions_count_for_more() -> None:
    want, grad = _reference(*_captions(2 * B))
    for rank, (value, own) in enumerate(run_ranks(_on_rank, 2)):
        assert value == pytest.approx(float(want), rel=1e-6)
        torch.testing.assert_close(own.double(), grad[rank * B : (rank + 1) * B], rtol=1e-5, atol=1e-8)
