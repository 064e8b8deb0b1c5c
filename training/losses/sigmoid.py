"""SigLIP's pairwise sigmoid loss and its gradient, streamed over columns. Pure functions of features.

The loss is that of Zhai et al. 2023, "Sigmoid loss for language image pre-training" (arXiv:2303.15343), section
3.2: with logits scale * <image_i, text_j> + bias, the sum of -log sigmoid(z_ij * logit_ij) over all pairs divided
by the number of images, z_ij being 1 for pairs that belong together and -1 for others. A rank's value is that of
its own B rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from training.gather import all_gather_rows, gather_with_grad, reduce_scatter_rows
from training.losses.blocks import block_buffers, column_blocks, full_precision, own_rows, with_gradients


def sigmoid_loss(image_BE: Tensor, text_BE: Tensor, scale: Tensor, bias: Tensor, *, local_loss: bool = True) -> Tensor:
    """Sigmoid loss of features of length 1, fp32 scalar; `scale` is the exponential of the log temperature.

    `local_loss` streams this rank's rows over all columns; otherwise every rank computes the dense global loss.
    Both have the same value on average over ranks, and the same gradients.
    """
    with full_precision(image_BE):
        image_BE, text_BE, scale, bias = image_BE.float(), text_BE.float(), scale.float(), bias.float()
        if local_loss:
            return with_gradients(_streamed, image_BE, text_BE, scale, bias)
        return dense_sigmoid_loss(gather_with_grad(image_BE), gather_with_grad(text_BE), scale, bias)


def dense_sigmoid_loss(image_GE: Tensor, text_GE: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The definition, over the whole matrix of logits."""
    logits_GG = scale * image_GE @ text_GE.T + bias
    signs_GG = 2 * torch.eye(len(logits_GG), device=logits_GG.device, dtype=logits_GG.dtype) - 1
    return -F.logsigmoid(signs_GG * logits_GG).sum() / len(logits_GG)


def _streamed(
    image_BE: Tensor, text_BE: Tensor, scale: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradients in one pass: no logit's gradient depends on another logit."""
    text_GE = all_gather_rows(text_BE)  # Collective:
    scaled_BE = image_BE * scale
    positive_B = (scaled_BE * text_GE[own_rows(len(image_BE))]).sum(dim=1, dtype=torch.float64) + bias
    missing_B = (-positive_B).sigmoid()
    value = F.softplus(-positive_B).sum()
    grad_bias = -missing_B.sum()

    grad_image_BE = torch.zeros_like(image_BE)
    grad_text_GE = torch.empty_like(text_GE)
    (buffer,) = block_buffers(1, image_BE, len(text_GE))
    for block in column_blocks(len(image_BE), len(text_GE)):
        text_CE = text_GE[block.columns]
        logits_BC = torch.mm(scaled_BE, text_CE.T, out=block.within(buffer)).add_(bias)
        block.positives(logits_BC).fill_(-torch.inf)
        value += F.softplus(logits_BC).sum()
        excess_BC = logits_BC.sigmoid_()
        grad_bias += excess_BC.sum()
        block.positives(excess_BC).copy_(-missing_B[block.rows])
        grad_image_BE.addmm_(excess_BC, text_CE)
        torch.mm(excess_BC.T, image_BE, out=grad_text_GE[block.columns])

    factor = 1 / len(image_BE)
    # Every logit of this rank is scale * <image, text> + bias: the sum of <image, text> with the excess.
    grad_scale = (grad_image_BE * image_BE).sum(dtype=torch.float64) * factor
    grad_text_BE = reduce_scatter_rows(grad_text_GE)  # Collective:
    return (
        (value * factor).float(),
        grad_image_BE.mul_(scale * factor),
        grad_text_BE.mul_(scale * factor),
        grad_scale.float(),
        (grad_bias * factor).float(),
    )
