"""What a step minimises: from the features of a batch to named losses. Knows no towers, no optimiser, no cadence.

The step adds the named losses up, and the log shows each under its name. Another objective is another callable
here; what it needs beyond the features below becomes a field of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from training.config import OptimConfig
from training.losses.caption import caption_loss
from training.losses.distill import Similarities, distillation_loss
from training.losses.sigmoid import sigmoid_loss
from training.losses.softmax import contrastive_loss

Losses = Mapping[str, Tensor]


@dataclass(frozen=True)
class Features:
    """A model's outputs for this rank's samples: image and text [B, E] of length 1, and what all samples share."""

    image: Tensor
    text: Tensor
    scale: Tensor  # exponential of the temperature's logarithm
    bias: Tensor | None = None  # of the logits, where the model has one
    caption_logits: Tensor | None = None  # [B, L, V] of tokens 1 to L, where the model writes captions
    tokens: Tensor | None = None  # [B, L + 1], with them
    teacher: Features | None = None  # of the same samples, without graph

    @property
    def of_samples(self) -> list[Tensor]:
        """What each micro-batch has for itself, and receives gradients for."""
        return [self.image, self.text]

    @property
    def of_model(self) -> list[Tensor]:
        """What all micro-batches share."""
        return [self.scale] if self.bias is None else [self.scale, self.bias]

    def as_leaves(self) -> Features:
        """The same values without history, ready to receive gradients."""
        image, text, scale, *bias = (
            tensor.detach().clone().requires_grad_() for tensor in [*self.of_samples, *self.of_model]
        )
        return replace(self, image=image, text=text, scale=scale, bias=bias[0] if bias else None)


def joined(parts: Sequence[Features]) -> Features:
    """The features of consecutive micro-batches as those of one batch."""
    teachers = [part.teacher for part in parts if part.teacher is not None]
    return replace(
        parts[0],
        image=torch.cat([part.image for part in parts]),
        text=torch.cat([part.text for part in parts]),
        teacher=joined(teachers) if teachers else None,
    )


class Objective(Protocol):
    """Losses by name. Each is this rank's share: the mean over ranks is the global loss."""

    def __call__(self, features: Features) -> Losses:
        """Called once a step on every rank, with the features of all its micro-batches; may hold collectives."""
        ...


@dataclass(frozen=True)
class Contrastive:
    """CLIP's softmax over the global batch, or SigLIP's sigmoid over its pairs."""

    sigmoid: bool = False
    local_loss: bool = True

    def __call__(self, features: Features) -> Losses:
        image, text, scale, bias = features.image, features.text, features.scale, features.bias
        if self.sigmoid:
            assert bias is not None, "--siglip gives the model a bias"
            return {"contrastive_loss": sigmoid_loss(image, text, scale, bias, local_loss=self.local_loss)}
        loss = contrastive_loss(image, text, scale, local_loss=self.local_loss)
        # A softmax does not see what all logits share: the gradient is zero, and DDP waits for it.
        return {"contrastive_loss": loss if bias is None else loss + 0 * bias}


@dataclass(frozen=True)
class Distillation:
    """CLIP's softmax, and its distance to that of a teacher."""

    local_loss: bool = True

    def __call__(self, features: Features) -> Losses:
        teacher = features.teacher
        assert teacher is not None, "the step has a teacher"
        distilled = distillation_loss(
            Similarities(features.image, features.text, features.scale),
            Similarities(teacher.image, teacher.text, teacher.scale),
            local_loss=self.local_loss,
        )
        return {**Contrastive(local_loss=self.local_loss)(features), "distill_loss": distilled}


@dataclass(frozen=True)
class Captioning:
    """CoCa's: the contrastive loss and that of a decoder, each with its weight (Yu et al. 2022, equation 3)."""

    contrastive: Contrastive
    contrastive_weight: float
    caption_weight: float
    pad_id: int

    def __call__(self, features: Features) -> Losses:
        logits, tokens = features.caption_logits, features.tokens
        assert logits is not None and tokens is not None, "the model writes captions"
        weighted = {name: self.contrastive_weight * loss for name, loss in self.contrastive(features).items()}
        return {
            **weighted,
            "caption_loss": caption_loss(logits, tokens, pad_id=self.pad_id, weight=self.caption_weight),
        }


def build_objective(optim: OptimConfig, *, has_teacher: bool, caption_pad_id: int | None = None) -> Objective:
    """The objective that the settings name; with `caption_pad_id`, of a model that writes captions padded so."""
    if has_teacher:
        return Distillation(optim.local_loss)
    contrastive = Contrastive(optim.siglip, optim.local_loss)
    if caption_pad_id is None:
        return contrastive
    weights = optim.coca_contrastive_loss_weight, optim.coca_caption_loss_weight
    return Captioning(contrastive, *weights, caption_pad_id)
