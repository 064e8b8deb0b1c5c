"""The caption loss of a decoder. A pure function of logits and token ids; knows no model.

The loss is that of Yu et al. 2022, "CoCa: Contrastive captioners are image-text foundation models", section 3: the
cross-entropy of each next token, padding left out, times a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from training.gather import all_reduce_sum, world_size

# Logits handled at once in fp32: 16 MiB.
CHUNK_ELEMENTS = 1 << 22


def caption_loss(logits_BLV: Tensor, tokens_BM: Tensor, *, pad_id: int = 0, weight: float = 2.0) -> Tensor:
    """Weighted mean cross-entropy of the logits for tokens 1, 2, ..., fp32 scalar; M = L + 1, V vocabulary.

    The mean is over the caption tokens of all ranks: a rank with longer captions counts for more, and the mean
    over ranks is that of one process with all of them. Beside the logits and their gradient, memory is one chunk.
    """
    if tokens_BM.shape[1] != logits_BLV.shape[1] + 1:
        raise ValueError(f"logits for {logits_BLV.shape[1]} positions need one token more, got {tokens_BM.shape[1]}")
    labels_N = tokens_BM[:, 1:].reshape(-1)
    counted = (labels_N != pad_id).sum().float()
    total = all_reduce_sum(counted) / world_size()  # Collective:
    return weight * _SummedCrossEntropy.apply(logits_BLV.flatten(0, 1), labels_N, pad_id) / total


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of rows whose label is not `pad_id`. Keeps the log-sum-exps, not the softmax."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, pad_id: int) -> Tensor:
        lse_N = torch.cat([logits_NV[rows].float().logsumexp(dim=1) for rows in _chunks(logits_NV)])
        label_logits_N = logits_NV.gather(1, labels_N[:, None])[:, 0].float()
        ctx.save_for_backward(logits_NV, labels_N, lse_N)
        ctx.pad_id = pad_id
        return torch.where(labels_N != pad_id, lse_N - label_logits_N, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, labels_N, lse_N = ctx.saved_tensors
        grad_N = torch.where(labels_N != ctx.pad_id, grad, 0)
        grad_NV = torch.empty_like(logits_NV)
        for rows in _chunks(logits_NV):
            share_NV = (logits_NV[rows] - lse_N[rows, None]).exp_()
            share_NV.scatter_add_(1, labels_N[rows, None], share_NV.new_full((len(share_NV), 1), -1.0))
            grad_NV[rows] = share_NV.mul_(grad_N[rows, None])
        return grad_NV, None, None


def _chunks(logits_NV: Tensor) -> Iterator[slice]:
    num_rows, size = len(logits_NV), max(1, CHUNK_ELEMENTS // logits_NV.shape[1])
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
