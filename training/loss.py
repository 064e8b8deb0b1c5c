"""The contrastive loss and its gradient, streamed over columns. Pure functions of features; no towers here.

Shapes: B samples of this rank, G = B x world size samples of all ranks, E embedding size.

The loss is CLIP's (Radford et al. 2021, section 2.3, figure 3): with logits s * <image_i, text_j>, the mean of
the row and the column cross-entropies with the diagonal as labels. What a rank returns is the mean over its own
B rows and B columns; the mean over ranks is the global loss. Gradients are scaled so that averaging parameter
gradients over ranks, as DDP does, gives the gradient of the global loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.gather import (
    all_gather_rows,
    all_reduce_sum,
    gather_with_grad,
    rank,
    reduce_scatter_rows,
)

# Elements of one block of logits: 64 MiB in fp32, large enough for full matmul speed.
_BLOCK_ELEMENTS = 1 << 24


def contrastive_loss(image_BE: Tensor, text_BE: Tensor, scale: Tensor, *, local_loss: bool = True) -> Tensor:
    """Contrastive loss of normalised features, fp32 scalar; `scale` is the exponential of the temperature's logarithm.

    `local_loss` streams this rank's rows over all columns; otherwise every rank computes the dense global loss.
    Both have the same value on average over ranks, and the same gradients.
    """
    with torch.autocast(image_BE.device.type, enabled=False):
        image_BE, text_BE, scale = image_BE.float(), text_BE.float(), scale.float()
        if local_loss:
            return _StreamedLoss.apply(image_BE, text_BE, scale)
        return dense_loss(gather_with_grad(image_BE), gather_with_grad(text_BE), scale)


def dense_loss(image_GE: Tensor, text_GE: Tensor, scale: Tensor) -> Tensor:
    """The definition: both cross-entropies over the whole matrix of logits."""
    logits_GG = scale * image_GE @ text_GE.T
    labels = torch.arange(len(logits_GG), device=logits_GG.device)
    return (F.cross_entropy(logits_GG, labels) + F.cross_entropy(logits_GG.T, labels)) / 2


class _StreamedLoss(torch.autograd.Function):
    """One tower is gathered and logits live one block of columns at a time, in the forward and the backward pass."""

    @staticmethod
    def forward(ctx: Any, image_BE: Tensor, text_BE: Tensor, scale: Tensor) -> Tensor:
        text_GE = all_gather_rows(text_BE)
        row_lse_B, column_lse_G = _log_sum_exps(image_BE, text_GE, scale)
        own = slice(rank() * len(image_BE), (rank() + 1) * len(image_BE))
        positives_B = scale * (image_BE * text_GE[own]).sum(dim=1)
        ctx.save_for_backward(image_BE, text_GE, scale, row_lse_B, column_lse_G)
        return (row_lse_B + column_lse_G[own] - 2 * positives_B).mean() / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image_BE, text_GE, scale, row_lse_B, column_lse_G = ctx.saved_tensors
        grad_image_BE = torch.zeros_like(image_BE)
        grad_text_GE = torch.empty_like(text_GE)
        offset = rank() * len(image_BE)
        for start, stop in _column_blocks(*_sizes(image_BE, text_GE)):
            block_CE = text_GE[start:stop]
            logits_BC = torch.mm(image_BE, block_CE.T).mul_(scale)
            # d(loss)/d(logit) is softmax over the row plus softmax over the column, minus two on the diagonal.
            excess_BC = (logits_BC - row_lse_B[:, None]).exp_()
            excess_BC += logits_BC.sub_(column_lse_G[None, start:stop]).exp_()
            if offset < stop and start < offset + len(image_BE):
                excess_BC.diagonal(offset - start).sub_(2)
            grad_image_BE.addmm_(excess_BC, block_CE)
            torch.mm(excess_BC.T, image_BE, out=grad_text_GE[start:stop])
        factor = grad / (2 * len(image_BE))
        # Every logit of this rank is scale * <image, text>: its sum with the excess is <grad_image, image>.
        grad_scale = (grad_image_BE * image_BE).sum() * factor
        grad_text_BE = reduce_scatter_rows(grad_text_GE)
        return grad_image_BE * (factor * scale), grad_text_BE * (factor * scale), grad_scale


def _log_sum_exps(image_BE: Tensor, text_GE: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of this rank's rows over all columns [B], and of all columns over all ranks' rows [G]."""
    row_lse_B = image_BE.new_full((len(image_BE),), -torch.inf)
    column_lse_G = image_BE.new_empty(len(text_GE))
    for start, stop in _column_blocks(*_sizes(image_BE, text_GE)):
        logits_BC = torch.mm(image_BE, text_GE[start:stop].T).mul_(scale)
        row_lse_B = torch.logaddexp(row_lse_B, torch.logsumexp(logits_BC, dim=1))
        column_lse_G[start:stop] = torch.logsumexp(logits_BC, dim=0)
    # Features are normalised, so |logit| <= scale <= 100: shifted by the scale, fp64 holds every rank's sum
    # without a maximum to agree on first, and one collective is enough.
    shift = scale.double()
    total_G = all_reduce_sum((column_lse_G.double() - shift).exp_())
    return row_lse_B, (total_G.log_() + shift).float()


def _sizes(image_BE: Tensor, text_GE: Tensor) -> tuple[int, int]:
    return len(image_BE), len(text_GE)


def _column_blocks(num_rows: int, num_columns: int) -> list[tuple[int, int]]:
    width = max(1, min(num_columns, _BLOCK_ELEMENTS // num_rows))
    return [(start, min(start + width, num_columns)) for start in range(0, num_columns, width)]


def block_bytes(num_rows: int, num_columns: int) -> int:
    """Of one block of logits."""
    start, stop = _column_blocks(num_rows, num_columns)[0]
    return 4 * num_rows * (stop - start)
