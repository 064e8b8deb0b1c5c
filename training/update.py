"""From gradients to new weights: one norm, one clip, one decision whether to update at all. Waits for nothing.

Knows shards and whole tensors alike; knows no batch, no loss function and no file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from training.distributed import World
from training.gather import all_reduce_sum
from training.losses import Losses
from training.optimizer import set_learning_rate
from training.parallel import unwrap
from training.precision import LossScale
from training.sharding import is_sharded, local
from training.witness import Sighting

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
    left_out: Tensor  # 1.0 when nothing was updated, be it to find the loss scale, 0-D; equal on all ranks


@torch.no_grad()
def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Losses,
    rate: float,
    own: Sighting,
    world: World,
    clip_grad_norm: float | None,
    loss_scale: LossScale | None = None,
) -> StepResult:
    """Clip, update unless something is not finite, clamp the temperature. Collective; no host sync.

    losses: this rank's means by name, 0-D each, of whose sum the gradients are in the parameters' `grad`, times the
    loss scale if there is one. own: goes into the result.
    An overflow under a loss scale that can still shrink leaves the update out but is not reported as `skipped`:
    it is how the scale is found.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    means, grad_norm = _reduced(torch.stack(list(losses.values())), parameters, world)
    mean_loss = means.sum()
    if loss_scale is not None:
        grad_norm = grad_norm / loss_scale.value
    bad = ~(torch.isfinite(mean_loss) & torch.isfinite(grad_norm))
    _rescale(parameters, grad_norm, clip_grad_norm, loss_scale)
    set_learning_rate(optimizer, rate)
    # The fused kernel leaves parameters and moments alone where found_inf is 1, as it does for a GradScaler.
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.step()
    skipped = bad
    if loss_scale is not None:
        skipped = bad & ~(torch.isfinite(mean_loss) & loss_scale.may_shrink())
        loss_scale.update(bad)
    log_scale = unwrap(model).logit_scale
    log_scale.clamp_(0, MAX_LOG_SCALE)
    parts = dict(zip(losses, means, strict=True))
    return StepResult(mean_loss, parts, grad_norm, log_scale.detach().exp(), skipped.float(), own, bad.float())


def _reduced(losses: Tensor, parameters: Sequence[Tensor], world: World) -> tuple[Tensor, Tensor]:
    """The mean losses, 1-D, and the norm of the whole gradient, equal on all ranks: bad on one is bad on all."""
    sharded = [p for p in parameters if is_sharded(p)]
    if not sharded:
        # The wrapper has made gradients equal on all ranks.
        norm = get_total_norm([p.grad for p in parameters], foreach=True)  # type: ignore[misc]
        return all_reduce_sum(losses) / world.size, norm  # Collective:
    # Sharding left these whole, and their gradients this rank's own; they travel with the rest.
    whole = [p.grad for p in parameters if not is_sharded(p)]
    square = get_total_norm([local(p.grad) for p in sharded], foreach=True).square()  # type: ignore[arg-type]
    totals = all_reduce_sum(torch.cat([losses.float(), torch.stack([square, *whole])]))  # type: ignore[list-item]  # Collective:
    means, square, grads = totals[: len(losses)] / world.size, totals[len(losses)], totals[len(losses) + 1 :]
    for grad, total in zip(whole, grads, strict=True):
        grad.copy_(total / world.size)  # type: ignore[union-attr]
    return means, (square + (grads / world.size).square().sum()).sqrt()


def _rescale(
    parameters: Sequence[Tensor], grad_norm: Tensor, clip_grad_norm: float | None, loss_scale: LossScale | None
) -> None:
    """Take the loss scale out of the gradients and clip them, in one pass."""
    factor = None if loss_scale is None else 1 / loss_scale.value
    if clip_grad_norm is not None:
        # The small number is torch.nn.utils.clip_grad_norm_'s.
        clip = (clip_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
        factor = clip if factor is None else clip * factor
    if factor is not None:
        torch._foreach_mul_([local(p.grad) for p in parameters], factor)  # type: ignore[arg-type]
