"""Text without its padding: which tokens of a batch can reach the features, and how they lie side by side.

Under a causal mask a token sees only what comes before it, and where one token of a row is pooled, what follows
that token is computed for nothing. The rest of a batch is one line of T tokens, in which rows of like length
form groups: only attention sees groups, everything else in a tower acts on each token alone. So a tower runs
each of its blocks once, however many groups there are and whatever other ranks have.

Knows token counts, not towers. Plans are made on the host, from tokens on the host: nothing waits for a device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.config import TextConfig
from models.layers import Groups

# Each group costs an attention call in every block, and each saves less than the one before (docs/benchmarks.md).
MAX_GROUPS = 6
# In tokens: what a further group must save to be worth its calls.
GROUP_COST = 32


@dataclass(frozen=True)
class TextPlan:
    """Where the tokens of a batch [B,L] lie in a line of T.

    index: int64 [T], their places in the flattened batch; pooled: int64 [B], where in the line each row's pooled
    token is; groups: the parts of the line.
    """

    index: Tensor
    pooled: Tensor
    groups: Groups

    def to(self, device: torch.device) -> TextPlan:
        """The plan with its tensors on `device`. The host does not wait for the copies."""
        if device.type != "cuda":
            return TextPlan(self.index.to(device), self.pooled.to(device), self.groups)
        index, pooled = (tensor.pin_memory().to(device, non_blocking=True) for tensor in (self.index, self.pooled))
        return TextPlan(index, pooled, self.groups)


def why_padding_counts(text: TextConfig) -> str | None:
    """The reason why a tower's features depend on what follows the pooled token, or None if they do not."""
    if text.hf_model_name:
        return f"the encoder {text.hf_model_name} of transformers takes whole rows"
    if text.no_causal_mask:
        return "its attention has no causal mask, so every token sees the padding"
    if text.embed_cls:
        return "it pools a class token behind the last position"
    if text.pool_type == "last":
        return "it pools the last of all positions, padding or not"
    return None


def plan_text(
    lengths: Tensor,
    row_length: int,
    max_groups: int = MAX_GROUPS,
    group_cost: int = GROUP_COST,
    multiple: int = 1,
) -> TextPlan:
    """The plan for rows of `row_length` tokens, of which the first `lengths` [B] (1 or more each) are needed.

    The last needed token of a row is the pooled one. A pure function: equal lengths give equal plans. T is filled
    up to a multiple of `multiple` with rows of a single token that nobody pools, for towers that are compiled for
    each T.
    """
    needed_B = lengths.numpy()
    order_B = needed_B.argsort(kind="stable")
    groups = best_groups(needed_B, max_groups, group_cost)
    pooled_B = np.empty_like(needed_B)
    index, begin, first = [], 0, 0
    for rows, length in groups.shapes:
        rows_R = order_B[first : first + rows]
        index.append((rows_R[:, None] * row_length + np.arange(length)).ravel())
        pooled_B[rows_R] = begin + np.arange(rows) * length + needed_B[rows_R] - 1
        begin, first = begin + rows * length, first + rows
    if surplus := -begin % multiple:
        index.append(np.zeros(surplus, np.int64))
        groups = Groups((*groups.shapes, (surplus, 1)))
    return TextPlan(torch.from_numpy(np.concatenate(index)), torch.from_numpy(pooled_B), groups)


def best_groups(lengths: np.ndarray, max_groups: int, group_cost: int) -> Groups:
    """Cuts the sorted lengths into at most `max_groups` groups, each padded to its longest row.

    Exact: the smallest number of tokens, with `group_cost` more for each group, by dynamic programming over the
    distinct lengths.
    """
    distinct, counts = np.unique(lengths, return_counts=True)
    below = np.concatenate([[0], counts.cumsum()])
    # cost[i, j]: one group of the rows with the distinct lengths i to j-1.
    cost = (below[None, 1:] - below[:-1, None]) * distinct[None, :].astype(np.float64) + group_cost
    cost[np.tril_indices(len(distinct), -1)] = np.inf
    best, choices = cost[0], []
    totals = [best[-1]]
    for _ in range(1, min(max_groups, len(distinct))):
        # Row i of `cost` begins where the groups before end with the distinct length i-1.
        through = best[:-1, None] + cost[1:]
        choices.append(through.argmin(axis=0) + 1)
        best = through.min(axis=0)
        totals.append(best[-1])
    ends = [len(distinct)]
    for choice in reversed(choices[: int(np.argmin(totals))]):
        ends.append(int(choice[ends[-1] - 1]))
    starts = [*ends[1:], 0]
    bounds = zip(reversed(starts), reversed(ends), strict=True)
    return Groups(tuple((int(below[end] - below[start]), int(distinct[end - 1])) for start, end in bounds))
