"""What the streamed losses share: blocks of columns, their log-sum-exps, gradients that come with the value.

Knows logits and where the positives are, no loss. Logits never exist but one block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from training.gather import all_reduce_sum, rank

# Logits of one block: 32 MiB in fp32. Smaller blocks make matrix products thin, larger ones only cost memory.
BLOCK_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class Block:
    """Columns `columns` of the logits; the positives in it are those of rows `rows`, on the diagonal `offset`."""

    num_rows: int
    columns: slice
    rows: slice
    offset: int

    def within(self, buffer: Tensor) -> Tensor:
        """A [B, C] matrix for this block in `buffer`; memory that is new for every block costs more than its use."""
        width = self.columns.stop - self.columns.start
        return buffer[: self.num_rows * width].view(self.num_rows, width)

    def positives(self, block_BC: Tensor) -> Tensor:
        """A view of the positives' elements in this block, possibly empty."""
        if self.rows.start == self.rows.stop:
            return block_BC.new_empty(0)
        return block_BC.diagonal(self.offset)


def column_blocks(num_rows: int, num_columns: int) -> Iterator[Block]:
    """The blocks of this rank's [B, G] logits, in order; the positive of row i is column rank x B + i."""
    width = _width(num_rows, num_columns)
    first = rank() * num_rows
    for start in range(0, num_columns, width):
        stop = min(start + width, num_columns)
        begin = max(0, start - first)
        rows = slice(begin, max(begin, min(num_rows, stop - first)))
        yield Block(num_rows, slice(start, stop), rows, first - start)


def block_buffers(count: int, rows_BE: Tensor, num_columns: int) -> list[Tensor]:
    """Memory for `count` matrices of any block."""
    return [rows_BE.new_empty(len(rows_BE) * _width(len(rows_BE), num_columns)) for _ in range(count)]


def block_bytes(num_rows: int, num_columns: int) -> int:
    """Of one [B, C] matrix in fp32."""
    return 4 * num_rows * _width(num_rows, num_columns)


def _width(num_rows: int, num_columns: int) -> int:
    return max(1, min(num_columns, BLOCK_ELEMENTS // num_rows))


def own_rows(num_rows: int) -> slice:
    """Where this rank's rows are among those of all ranks."""
    return slice(rank() * num_rows, (rank() + 1) * num_rows)


@dataclass(frozen=True)
class Normalizers:
    """Log-sum-exps of this rank's rows and of all columns, and the odds of negatives against the positive; fp64.

    The odds (their logarithm) are what a loss near zero is made of: -log p = softplus(odds) and
    1 - p = sigmoid(odds) keep their relative precision where 1 - exp(logit - lse) has lost it.
    """

    row_lse_B: Tensor
    column_lse_G: Tensor
    row_odds_B: Tensor
    column_odds_B: Tensor  # of this rank's own columns

    @property
    def missing_B(self) -> Tensor:
        """What the positives leave to others, of their rows and of their columns: 0 to 2."""
        return self.row_odds_B.sigmoid() + self.column_odds_B.sigmoid()


def normalizers(image_BE: Tensor, text_GE: Tensor, scale: Tensor) -> Normalizers:
    """One pass over the logits and one all-reduce of two numbers a column."""
    own = own_rows(len(image_BE))
    positive_B = scale.double() * (image_BE * text_GE[own]).sum(dim=1, dtype=torch.float64)
    rest_B, rest_G = _log_sum_exps_of_negatives(image_BE * scale, text_GE)
    # |logit| <= scale, and the scale is at most 100: shifted by it, fp64 holds every rank's sum without a
    # maximum to agree on first, and one collective is enough.
    shift = scale.double()
    negative_G, positive_G = rest_G - shift, torch.full_like(rest_G, -torch.inf)
    positive_G[own] = positive_B - shift
    negative_G, positive_G = all_reduce_sum(torch.stack([negative_G, positive_G]).exp_())  # Collective:
    return Normalizers(
        row_lse_B=torch.logaddexp(rest_B, positive_B),
        column_lse_G=(negative_G + positive_G).log_() + shift,
        row_odds_B=rest_B - positive_B,
        column_odds_B=(negative_G[own] / positive_G[own]).log_(),
    )


def _log_sum_exps_of_negatives(scaled_BE: Tensor, text_GE: Tensor) -> tuple[Tensor, Tensor]:
    """Over all columns for each row [B], over this rank's rows for each column [G], positives left out."""
    rest_B = scaled_BE.new_full((len(scaled_BE),), -torch.inf, dtype=torch.float64)
    rest_G = scaled_BE.new_empty(len(text_GE), dtype=torch.float64)
    buffer, scratch = block_buffers(2, scaled_BE, len(text_GE))
    for block in column_blocks(len(scaled_BE), len(text_GE)):
        logits_BC = torch.mm(scaled_BE, text_GE[block.columns].T, out=block.within(buffer))
        block.positives(logits_BC).fill_(-torch.inf)
        rest_B = torch.logaddexp(rest_B, _log_sum_exp(logits_BC, 1, block.within(scratch)))
        rest_G[block.columns] = _log_sum_exp(logits_BC, 0, block.within(scratch))
    return rest_B, rest_G


def _log_sum_exp(logits_BC: Tensor, dim: int, scratch_BC: Tensor) -> Tensor:
    """torch.logsumexp, rounded to fp32 in the sum but not in the logarithm; -inf is nothing to add."""
    peak = logits_BC.amax(dim, keepdim=True).clamp_min_(torch.finfo(logits_BC.dtype).min)
    total = torch.sub(logits_BC, peak, out=scratch_BC).exp_().sum(dim)
    return total.double().log_() + peak.squeeze(dim)


def shares(logits_BC: Tensor, lse: Tensor, out: Tensor) -> Tensor:
    """exp(logits - lse) in fp32; `lse` in fp64 broadcasts over the block, `out` may be the logits themselves.

    Near 100, fp32 rounds to a relative error of 4e-6 in the share, the same for a whole row: what is cut off the
    log-sum-exp is subtracted too.
    """
    rounded = lse.float()
    return torch.sub(logits_BC, rounded, out=out).sub_((lse - rounded).float()).exp_()


def with_gradients(compute: Callable[..., tuple[Tensor | None, ...]], *inputs: Tensor) -> Tensor:
    """A loss, differentiable once, of which `compute(*inputs)` gives the value and the gradient for each input."""
    return _WithGradients.apply(compute, *inputs)


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Callable[..., tuple[Tensor | None, ...]], *inputs: Tensor) -> Tensor | None:
        value, *gradients = compute(*inputs)
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(None if own is None else grad * own for own in ctx.saved_tensors)


def full_precision(features: Tensor) -> AbstractContextManager[None]:
    """Autocast around a loss must not reach its arithmetic."""
    return torch.autocast(features.device.type, enabled=False)
