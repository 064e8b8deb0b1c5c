"""One optimiser step: micro-batches, exact accumulation, loss and gradients; `training.update` does the rest.

Knows no files and no cadence. Random numbers of a step are keyed by (seed, step, rank, micro-batch): a resume
needs no generator state, and a micro-batch can be repeated exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data import Batch
from models.resnet import frozen_batch_statistics
from training.distributed import World
from training.loss import contrastive_loss
from training.parallel import unwrap, without_sync
from training.precision import LossScale, autocast
from training.update import StepResult, update

__all__ = ["StepResult", "TrainStep", "draw_seed"]


@dataclass(frozen=True)
class TrainStep:
    """Everything that one update needs; called once a step on every rank."""

    model: nn.Module  # as `parallelize` returns it
    optimizer: torch.optim.Optimizer
    transform: nn.Module  # (uint8 images, draws) -> normalised floats
    world: World
    seed: int
    precision: str
    accum_steps: int
    clip_grad_norm: float | None
    local_loss: bool
    loss_scale: LossScale | None = None

    def __call__(self, batch: Batch, step: int, rate: float) -> StepResult:
        """Update the parameters with this rank's `batch` of micro_batch x accum_steps rows."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        micro_batches = batch.split(self.accum_steps)
        loss = self._accumulated(micro_batches, step) if self.accum_steps > 1 else self._single(micro_batches[0], step)
        return self._update(loss, rate)

    def _single(self, batch: Batch, step: int) -> Tensor:
        image, text, scale = self._forward(batch, step, 0)
        loss = self._loss(image, text, scale)
        self._scaled(loss).backward()
        return loss.detach()

    def _accumulated(self, batches: list[Batch], step: int) -> Tensor:
        """Gao et al. 2021, "Scaling deep contrastive learning batch size", section 3, with the draws repeated.

        Features without graph, the gradient of the loss with respect to them once, then every micro-batch again
        with that gradient. The temperature receives its gradient once, in the pass that synchronises.
        """
        with torch.no_grad(), frozen_batch_statistics(self.model):
            outputs = [self._forward(batch, step, i, through=unwrap(self.model)) for i, batch in enumerate(batches)]
        image = torch.cat([output[0] for output in outputs]).requires_grad_()
        text = torch.cat([output[1] for output in outputs]).requires_grad_()
        scale = outputs[0][2].clone().requires_grad_()
        loss = self._loss(image, text, scale)
        self._scaled(loss).backward()
        image_grads, text_grads = image.grad.chunk(len(batches)), text.grad.chunk(len(batches))  # type: ignore[union-attr]
        for i, batch in enumerate(batches[:-1]):
            with without_sync(self.model):
                again = self._forward(batch, step, i)
                torch.autograd.backward(again[:2], [image_grads[i], text_grads[i]])
        last = self._forward(batches[-1], step, len(batches) - 1)
        torch.autograd.backward(last, [image_grads[-1], text_grads[-1], scale.grad])
        return loss.detach()

    def _forward(
        self, batch: Batch, step: int, micro: int, through: Callable[..., tuple[Tensor, ...]] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features of one micro-batch and the scale, with the random draws that belong to it."""
        torch.manual_seed(draw_seed(self.seed, step, self.world.rank, micro))
        images = self.transform(batch.images, batch.draws)
        with autocast(self.precision, self.world.device):
            image, text, scale = (through or self.model)(images, batch.tokens)[:3]
        return image, text, scale

    def _loss(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return contrastive_loss(image, text, scale, local_loss=self.local_loss)

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.loss_scale is None else loss * self.loss_scale.value

    def _update(self, loss: Tensor, rate: float) -> StepResult:
        return update(self.model, self.optimizer, loss, rate, self.world, self.clip_grad_norm, self.loss_scale)


def draw_seed(seed: int, step: int, rank: int, micro: int) -> int:
    """The generator seed of one micro-batch: equal keys give equal draws on every host and version."""
    digest = hashlib.blake2b(repr((seed, step, rank, micro)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)
