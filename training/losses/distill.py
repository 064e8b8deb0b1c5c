"""Distillation of a teacher's similarities and its gradient, streamed over columns. Pure functions of features.

The loss is the cross-entropy between the teacher's and the student's softmax over the global batch, the mean of the
image to text and the text to image direction: "affinity mimicking" of Wu et al. 2023, "TinyCLIP: CLIP distillation
via affinity mimicking and weight inheritance" (arXiv:2309.12314), section 3.1. Each model has its own temperature,
and may have its own embedding size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from training.gather import all_gather_rows, gather_with_grad, reduce_scatter_rows
from training.losses.blocks import block_buffers, column_blocks, full_precision, normalizers, shares, with_gradients


class Similarities(NamedTuple):
    """What a model's logits are made of: image [B, E], text [B, E] or [G, E], and its scale."""

    image: Tensor
    text: Tensor
    scale: Tensor


def distillation_loss(student: Similarities, teacher: Similarities, *, local_loss: bool = True) -> Tensor:
    """Fp32 scalar with gradients for the student alone, its temperature included.

    `local_loss` streams this rank's rows over all columns; otherwise every rank computes the dense global loss.
    Both have the same value on average over ranks, and the same gradients.
    """
    with full_precision(student.image):
        student = Similarities(*(tensor.float() for tensor in student))
        teacher = Similarities(*(tensor.detach().float() for tensor in teacher))
        if local_loss:
            return with_gradients(_streamed, *student, *teacher)
        return dense_distillation_loss(_gathered(student), _gathered(teacher))


def dense_distillation_loss(student: Similarities, teacher: Similarities) -> Tensor:
    """The definition, over the whole matrices of logits."""
    logits_GG, target_GG = (model.scale * model.image @ model.text.T for model in (student, teacher))
    rows = (target_GG.softmax(dim=1) * logits_GG.log_softmax(dim=1)).sum()
    columns = (target_GG.softmax(dim=0) * logits_GG.log_softmax(dim=0)).sum()
    return -(rows + columns) / (2 * len(logits_GG))


def _gathered(model: Similarities) -> Similarities:
    return Similarities(gather_with_grad(model.image), gather_with_grad(model.text), model.scale)


def _streamed(*tensors: Tensor) -> tuple[Tensor | None, ...]:
    """Loss and gradients in two passes over both models' logits."""
    image_BE, text_BE, scale, *rest = tensors
    teacher = Similarities(*rest)
    text_GE, teacher_GE = all_gather_rows(text_BE), all_gather_rows(teacher.text)  # Collective:
    sums = normalizers(image_BE, text_GE, scale)
    targets = normalizers(teacher.image, teacher_GE, teacher.scale)

    kept_B = targets.missing_B - sums.missing_B
    scaled_BE, scaled_teacher_BE = image_BE * scale, teacher.image * teacher.scale
    value = scale.new_zeros((), dtype=torch.float64)
    grad_image_BE = torch.zeros_like(image_BE)
    grad_text_GE = torch.empty_like(text_GE)
    buffers = block_buffers(5, image_BE, len(text_GE))
    for block in column_blocks(len(image_BE), len(text_GE)):
        columns, text_CE = block.columns, text_GE[block.columns]
        logits_BC, target_BC, excess_BC, share_BC, more_BC = (block.within(buffer) for buffer in buffers)
        torch.mm(scaled_BE, text_CE.T, out=logits_BC)
        torch.mm(scaled_teacher_BE, teacher_GE[columns].T, out=target_BC)
        shares(target_BC, targets.row_lse_B[:, None], out=share_BC)
        value += _cross_entropy(logits_BC, sums.row_lse_B[:, None], share_BC, out=excess_BC)
        shares(target_BC, targets.column_lse_G[columns], out=share_BC)
        value += _cross_entropy(logits_BC, sums.column_lse_G[columns], share_BC, out=more_BC)
        excess_BC += more_BC
        block.positives(excess_BC).copy_(kept_B[block.rows])
        grad_image_BE.addmm_(excess_BC, text_CE)
        torch.mm(excess_BC.T, image_BE, out=grad_text_GE[columns])

    factor = 1 / (2 * len(image_BE))
    # Every logit of this rank is scale * <image, text>: its sum with the excess is <grad_image, image>.
    grad_scale = (grad_image_BE * image_BE).sum(dtype=torch.float64).float() * factor
    grad_text_BE = reduce_scatter_rows(grad_text_GE)  # Collective:
    gradients = grad_image_BE.mul_(scale * factor), grad_text_BE.mul_(scale * factor), grad_scale
    return (value * factor).float(), *gradients, None, None, None


def _cross_entropy(logits_BC: Tensor, lse: Tensor, target_share_BC: Tensor, out: Tensor) -> Tensor:
    """Of one direction, summed over the block; `out` receives its derivative by the student's logits."""
    surprise_BC = torch.sub(lse.float(), logits_BC, out=out)
    cost = torch.dot(target_share_BC.flatten(), surprise_BC.flatten())
    shares(logits_BC, lse, out=out).sub_(target_share_BC)
    return cost
