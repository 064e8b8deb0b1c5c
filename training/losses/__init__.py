"""Losses on features and on caption logits, and the objective that a step minimises. Knows no towers, no files.

Shapes: B samples of this rank, G = B x world size samples of all ranks, C columns of a block, E embedding size.

What a rank returns is its share: the mean over ranks is the global loss, and averaging parameter gradients over
ranks, as DDP does, gives the gradient of the global loss. Every gradient is computed together with its value,
block by block, so that nothing of size B x G is kept for the backward pass.
"""

from training.losses.caption import caption_loss
from training.losses.distill import dense_distillation_loss, distillation_loss
from training.losses.objective import Contrastive, Distillation, Features, Losses, Objective
from training.losses.sigmoid import dense_sigmoid_loss, sigmoid_loss
from training.losses.softmax import contrastive_loss, dense_loss

__all__ = [
    "Contrastive",
    "Distillation",
    "Features",
    "Losses",
    "Objective",
    "caption_loss",
    "contrastive_loss",
    "dense_distillation_loss",
    "dense_loss",
    "dense_sigmoid_loss",
    "distillation_loss",
    "sigmoid_loss",
]
