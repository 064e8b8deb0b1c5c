"""CLIP's contrastive loss and its gradient, streamed over columns. Pure functions of features.

The loss is that of Radford et al. 2021, "Learning transferable visual models from natural language supervision",
section 2.3, figure 3: with logits scale * <image_i, text_j>, the mean of the row and the column cross-entropies
with the diagonal as labels. A rank's value is the mean over its own B rows and B columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from training.gather import all_gather_rows, gather_with_grad, reduce_scatter_rows
from training.losses.blocks import block_buffers, column_blocks, full_precision, normalizers, shares, with_gradients


def contrastive_loss(image_BE: Tensor, text_BE: Tensor, scale: Tensor, *, local_loss: bool = True) -> Tensor:
    """Contrastive loss of features of length 1, fp32 scalar; `scale` is the exponential of the log temperature.

    Features may be a little longer than 1, and the scale is at most 100, or a sum may leave fp64.
    `local_loss` streams this rank's rows over all columns; otherwise every rank computes the dense global loss.
    Both have the same value on average over ranks, and the same gradients.
    """
    with full_precision(image_BE):
        image_BE, text_BE, scale = image_BE.float(), text_BE.float(), scale.float()
        if local_loss:
            return with_gradients(_streamed, image_BE, text_BE, scale)
        return dense_loss(gather_with_grad(image_BE), gather_with_grad(text_BE), scale)


def dense_loss(image_GE: Tensor, text_GE: Tensor, scale: Tensor) -> Tensor:
    """The definition: both cross-entropies over the whole matrix of logits."""
    logits_GG = scale * image_GE @ text_GE.T
    labels = torch.arange(len(logits_GG), device=logits_GG.device)
    return (F.cross_entropy(logits_GG, labels) + F.cross_entropy(logits_GG.T, labels)) / 2


def _streamed(image_BE: Tensor, text_BE: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradients in two passes over the logits: one for the log-sum-exps, one for the gradients."""
    text_GE = all_gather_rows(text_BE)  # Collective:
    sums = normalizers(image_BE, text_GE, scale)
    value = (F.softplus(sums.row_odds_B) + F.softplus(sums.column_odds_B)).mean() / 2

    missing_B, scaled_BE = sums.missing_B, image_BE * scale
    grad_image_BE = torch.zeros_like(image_BE)
    grad_text_GE = torch.empty_like(text_GE)
    buffer, scratch = block_buffers(2, image_BE, len(text_GE))
    for block in column_blocks(len(image_BE), len(text_GE)):
        text_CE = text_GE[block.columns]
        logits_BC = torch.mm(scaled_BE, text_CE.T, out=block.within(buffer))
        # d(loss)/d(logit) of a negative is its share of its row and of its column.
        excess_BC = shares(logits_BC, sums.row_lse_B[:, None], out=block.within(scratch))
        excess_BC += shares(logits_BC, sums.column_lse_G[block.columns], out=logits_BC)
        block.positives(excess_BC).copy_(-missing_B[block.rows])
        grad_image_BE.addmm_(excess_BC, text_CE)
        torch.mm(excess_BC.T, image_BE, out=grad_text_GE[block.columns])

    factor = 1 / (2 * len(image_BE))
    # Every logit of this rank is scale * <image, text>: its sum with the excess is <grad_image, image>.
    grad_scale = (grad_image_BE * image_BE).sum(dtype=torch.float64).float() * factor
    grad_text_BE = reduce_scatter_rows(grad_text_GE)  # Collective:
    return value.float(), grad_image_BE.mul_(scale * factor), grad_text_BE.mul_(scale * factor), grad_scale
