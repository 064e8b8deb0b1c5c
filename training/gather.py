"""Collectives on features, with their gradients. Knows tensors and a process group, no loss and no model.

B rows of this rank, G = B x world size rows of all, E embedding size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Newer torch renamed the two, with the same meaning, and warns about the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def world_size() -> int:
    """Ranks of the default group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This rank in the default group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather_rows(rows_BE: Tensor) -> Tensor:
    """Rows of all ranks in rank order, [G, E]; no gradient."""
    if world_size() == 1:
        return rows_BE
    gathered = rows_BE.new_empty((rows_BE.shape[0] * world_size(), *rows_BE.shape[1:]))
    _all_gather(gathered, rows_BE.contiguous())  # Collective:
    return gathered


def reduce_scatter_rows(rows_GE: Tensor) -> Tensor:
    """Sum over ranks, of which each keeps its own rows: [G, E] -> [B, E]."""
    if world_size() == 1:
        return rows_GE
    own = rows_GE.new_empty((rows_GE.shape[0] // world_size(), *rows_GE.shape[1:]))
    _reduce_scatter(own, rows_GE.contiguous())  # Collective:
    return own


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values)  # Collective:
    return values


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_BE: Tensor) -> Tensor:
        return all_gather_rows(rows_BE)

    @staticmethod
    def backward(ctx: Any, grad_GE: Tensor) -> Tensor:
        return reduce_scatter_rows(grad_GE)


def gather_with_grad(rows_BE: Tensor) -> Tensor:
    """Rows of all ranks, [G, E]; the backward pass sums every rank's gradient of this rank's rows."""
    return rows_BE if world_size() == 1 else _GatherWithGrad.apply(rows_BE)
