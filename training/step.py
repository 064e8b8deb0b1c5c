"""One optimiser step: micro-batches, exact accumulation, loss and gradients; `training.update` does the rest.

Knows no files and no cadence. Random numbers are functions of keys: a resume needs no generator state, and a
micro-batch can be repeated exactly. Masks of the towers are keyed by (seed, step, row), see `models.row_draws`.

What accumulation promises: the gradient of the loss of all rows at once, whatever the number of micro-batches, with
dropout, patch dropout and stochastic depth on. Two things see a micro-batch at a time: batch norms, and the noise in
erased boxes, which is keyed by (seed, step, rank, micro-batch): as many numbers as a picture has values are not worth
hashing one by one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from data import Batch
from models import TextPlan
from models.resnet import frozen_batch_statistics
from models.row_draws import row_keys
from training.distributed import World
from training.losses import Features, Losses, Objective
from training.losses.objective import joined
from training.parallel import unwrap, without_sync
from training.precision import LossScale, autocast
from training.update import StepResult, update
from training.witness import Witness

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
    objective: Objective
    teacher: nn.Module | None = None  # frozen; sees the same images and tokens
    cut_padding: bool = False  # of the texts; only for towers where it counts for nothing
    static_shapes: bool = False  # towers are compiled for few lengths
    loss_scale: LossScale | None = None
    witness: Witness = field(default_factory=Witness)

    def __call__(self, batch: Batch, step: int, rate: float) -> StepResult:
        """Update the parameters with this rank's `batch` of micro_batch x accum_steps rows."""
        self.world.pulse.enter("step", step + 1)
        return self._update(self._gradients(batch, step), rate)

    def rehearse(self, batch: Batch) -> None:
        """All of a step, whose update is then left out like that of a loss that is not finite."""
        losses = self._gradients(batch, 0)
        rate = self.optimizer.param_groups[0]["lr"]
        self._update({name: torch.full_like(loss, torch.nan) for name, loss in losses.items()}, rate)

    def _gradients(self, batch: Batch, step: int) -> Losses:
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        micro_batches = batch.split(self.accum_steps)
        if self.accum_steps > 1:
            return self._accumulated(micro_batches, step)
        return self._single(micro_batches[0], step)

    def _single(self, batch: Batch, step: int) -> Losses:
        return self._backward(self._forward(batch, step, 0, taught=True))

    def _accumulated(self, batches: list[Batch], step: int) -> Losses:
        """Gao et al. 2021, "Scaling deep contrastive learning batch size", section 3, with the draws repeated.

        Features without graph, the gradient of the loss with respect to them once, then every micro-batch again
        with that gradient. Temperature and bias receive their gradient once, in the pass that synchronises.
        """
        with torch.no_grad(), frozen_batch_statistics(self.model):
            parts = [
                self._forward(batch, step, i, through=unwrap(self.model), taught=True)
                for i, batch in enumerate(batches)
            ]
        features = joined(parts).as_leaves()
        losses = self._backward(features)
        grads = list(zip(*(tensor.grad.chunk(len(batches)) for tensor in features.of_samples), strict=True))  # type: ignore[union-attr]
        for i, batch in enumerate(batches[:-1]):
            with without_sync(self.model):
                _backward_where_wanted(self._forward(batch, step, i).of_samples, grads[i])
        last = self._forward(batches[-1], step, len(batches) - 1)
        shared = [tensor.grad for tensor in features.of_model]
        _backward_where_wanted([*last.of_samples, *last.of_model], [*grads[-1], *shared])
        return losses

    def _forward(
        self,
        batch: Batch,
        step: int,
        micro: int,
        through: Callable[..., tuple[Tensor, ...]] | None = None,
        taught: bool = False,
    ) -> Features:
        """Features of one micro-batch, the teacher's too if `taught`, with the random draws that belong to it."""
        torch.manual_seed(draw_seed(self.seed, step, self.world.rank, micro))
        self._set_row_keys(step, micro, len(batch))
        images = self.transform(batch.images, batch.draws)
        # Equal tokens give equal plans, so both passes over a micro-batch run alike.
        plan = self._text_plan(batch.host_tokens) if self.cut_padding else None
        with autocast(self.precision, self.world.device):
            features = Features(*(through or self.model)(images, batch.tokens, plan))
            if self.teacher is None or not taught:
                return features
            with torch.no_grad():
                return replace(features, teacher=Features(*self.teacher(images, batch.tokens)))

    def _backward(self, features: Features) -> Losses:
        """The losses, detached, after the backward pass of their sum."""
        self.witness.features(features.image, features.text)
        losses = self.objective(features)
        total = torch.stack(list(losses.values())).sum()
        (total if self.loss_scale is None else total * self.loss_scale.value).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _set_row_keys(self, step: int, micro: int, rows: int) -> None:
        """Rows are numbered through all ranks and micro-batches of a step: how it is cut leaves no trace."""
        first = (self.world.rank * self.accum_steps + micro) * rows
        seed = draw_seed(self.seed, step, -1, -1)
        unwrap(self.model).row_draws.keys = row_keys(seed, first, rows, self.world.device)

    def _text_plan(self, tokens: Tensor) -> TextPlan:
        # A token a row more or less makes another length: of those few occur.
        multiple = len(tokens) if self.static_shapes else 1
        return unwrap(self.model).text_tower.plan_text(tokens, multiple).to(self.world.device)

    def _update(self, losses: Losses, rate: float) -> StepResult:
        own = self.witness.take()
        return update(self.model, self.optimizer, losses, rate, own, self.world, self.clip_grad_norm, self.loss_scale)


def _backward_where_wanted(outputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """The backward pass from these outputs; those of a tower that is locked whole have none."""
    wanted = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
    if wanted:
        torch.autograd.backward([output for output, _ in wanted], [grad for _, grad in wanted])


def draw_seed(seed: int, step: int, rank: int, micro: int) -> int:
    """The generator seed of one micro-batch: equal keys give equal draws on every host and version."""
    digest = hashlib.blake2b(repr((seed, step, rank, micro)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)
