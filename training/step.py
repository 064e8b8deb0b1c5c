"""One optimiser step: micro-batches, exact accumulation, clipping, the finite-or-skip decision.

Knows no files and no cadence. Random numbers of a step are keyed by (seed, step, rank, micro-batch): a resume
needs no generator state, and a micro-batch can be repeated exactly.

What accumulation promises: the gradient of the loss of all rows at once, under the draws of each micro-batch. With
another number of micro-batches dropout, patch dropout, stochastic depth and erasing noise draw anew, as they do with
another number of ranks. Draws by row would need a generator for each row, or k times the numbers on the device, and
could not reach into compiled blocks, to replace one random mask by another that is no better. Where nothing is drawn
the number of micro-batches changes nothing but rounding; batch norms, which see a micro-batch at a time, excepted.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from data import Batch
from models import TextPlan
from models.resnet import frozen_batch_statistics
from training.distributed import World
from training.gather import all_reduce_sum
from training.losses import Features, Losses, Objective
from training.losses.objective import joined
from training.optimizer import set_learning_rate
from training.parallel import autocast, unwrap, without_sync
from training.witness import Sighting, Witness

# CLIP's bound (Radford et al. 2021, section 2.5): logits are scaled by at most 100.
MAX_LOG_SCALE = math.log(100)


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind, on the device: nothing here has been waited for."""

    loss: Tensor  # global mean over ranks, 0-D
    losses: Mapping[str, Tensor]  # its parts by name, global means, 0-D
    grad_norm: Tensor  # before clipping, 0-D
    scale: Tensor  # exponential of the temperature's logarithm, 0-D
    skipped: Tensor  # 1.0 when loss or gradient was not finite and nothing was updated, 0-D; equal on all ranks
    own: Sighting  # what this rank alone saw


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
    witness: Witness = field(default_factory=Witness)

    def __call__(self, batch: Batch, step: int, rate: float) -> StepResult:
        """Update the parameters with this rank's `batch` of micro_batch x accum_steps rows."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        micro_batches = batch.split(self.accum_steps)
        losses = (
            self._accumulated(micro_batches, step) if self.accum_steps > 1 else self._single(micro_batches[0], step)
        )
        return self._update(losses, rate)

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
                torch.autograd.backward(self._forward(batch, step, i).of_samples, grads[i])
        last = self._forward(batches[-1], step, len(batches) - 1)
        shared = [tensor.grad for tensor in features.of_model]
        torch.autograd.backward([*last.of_samples, *last.of_model], [*grads[-1], *shared])
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
        torch.stack(list(losses.values())).sum().backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _text_plan(self, tokens: Tensor) -> TextPlan:
        return unwrap(self.model).text_tower.plan_text(tokens).to(self.world.device)

    def _update(self, losses: Losses, rate: float) -> StepResult:
        """Clip, update unless something is not finite, clamp the temperature. No host sync."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        grad_norm = get_total_norm([p.grad for p in parameters], foreach=True)
        # Collective: the mean loss is not finite on every rank as soon as it is on one.
        means = all_reduce_sum(torch.stack(list(losses.values()))) / self.world.size
        mean_loss = means.sum()
        skipped = 1.0 - (torch.isfinite(mean_loss) & torch.isfinite(grad_norm)).float()
        if self.clip_grad_norm is not None:
            clip_grads_with_norm_(parameters, self.clip_grad_norm, grad_norm, foreach=True)
        set_learning_rate(self.optimizer, rate)
        # The fused kernel leaves parameters and moments alone where found_inf is 1, as it does for a GradScaler.
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.step()
        log_scale = unwrap(self.model).logit_scale
        with torch.no_grad():
            log_scale.clamp_(0, MAX_LOG_SCALE)
        parts = dict(zip(losses, means, strict=True))
        return StepResult(mean_loss, parts, grad_norm, log_scale.detach().exp(), skipped, self.witness.take())


def draw_seed(seed: int, step: int, rank: int, micro: int) -> int:
    """The generator seed of one micro-batch: equal keys give equal draws on every host and version."""
    digest = hashlib.blake2b(repr((seed, step, rank, micro)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)
