"""Masks that belong to rows: dropout, stochastic depth and patch dropout as functions of a row's key.

torch draws a mask for a whole batch at a time, so what a row gets depends on the rows before it. Here it depends on
the row's own key and the layer alone: the same training follows however a batch is cut into micro-batches, and a
micro-batch that runs twice gets the same masks twice. Whoever trains sets the keys; without them torch draws.
Numbers are hashed on the rows' device, where nothing waits. Knows no step and no rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", section 5), as signed words.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
_UNIT_BITS = 24  # what fp32 holds exactly


def mixed(words: Tensor) -> Tensor:
    """int64 words to int64 words of which every bit depends on every bit, one to one."""
    words = (words ^ _shifted(words, 30)) * _FIRST
    words = (words ^ _shifted(words, 27)) * _SECOND
    return words ^ _shifted(words, 31)


def row_keys(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """Keys of rows number `first` and following of a step, int64 [count]; `seed` has 63 bits."""
    rows = torch.arange(first, first + count, dtype=torch.int64, device=device)
    return mixed((rows + 1) * _GAMMA + seed)


def layer_salt(layer: int) -> int:
    """What tells layer number `layer` from the others, 62 bits."""
    return layer * _SECOND % (1 << 62)


class RowDraws:
    """What the layers of one model share: the keys of the rows that run, int64 [B], or None."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None

    def uniform(self, salt: int | Tensor, rows: int, count: int, device: torch.device) -> Tensor:
        """fp32 [rows, count] in [0, 1) for the layer of this `salt` (see `layer_salt`)."""
        if self.keys is None or len(self.keys) != rows:
            return torch.rand(rows, count, device=device)
        numbers = torch.arange(1, count + 1, dtype=torch.int64, device=device) * _GAMMA
        words_B1 = mixed(self.keys + salt)[:, None]
        return _shifted(mixed(words_B1 + numbers), 64 - _UNIT_BITS).float() * 2.0**-_UNIT_BITS


class RowDropout(nn.Module):
    """Dropout of single values: [B, ...]."""

    def __init__(self, share: float, draws: RowDraws, layer: int):
        super().__init__()
        # As `p`, attention of transformers looks it up, to drop by torch's own draws.
        self.share = self.p = share
        self._draws, self._salt = draws, layer_salt(layer)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if self._draws.keys is None or x.ndim < 2:
            return F.dropout(x, self.share)
        drawn = self._draws.uniform(self._salt, len(x), x[0].numel(), x.device).view(x.shape)
        return torch.where(drawn >= self.share, x * (1 / (1 - self.share)), torch.zeros_like(x))


class RowDropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): a branch [B, ...] is left out for some rows."""

    share: Tensor
    salt: Tensor

    def __init__(self, share: float, draws: RowDraws, layer: int):
        super().__init__()
        # Tensors, not numbers: blocks that differ in a number are compiled one by one, and these stand in every block.
        self.register_buffer("share", torch.tensor(share), persistent=False)
        self.register_buffer("salt", torch.tensor(layer_salt(layer)), persistent=False)
        self._draws = draws

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept_B = self._draws.uniform(self.salt, len(x), 1, x.device) >= self.share
        return x * (kept_B / (1 - self.share)).to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class PatchDropout(nn.Module):
    """Keeps a random subset of patches in training, always with the prefix tokens (Li et al. 2022, FLIP).

    The same number for every image, so shapes stay static; the draw happens on the tensor's own device,
    so it waits for nothing.
    """

    def __init__(self, dropped_share: float, num_prefix_tokens: int = 1) -> None:
        super().__init__()
        self.dropped_share = dropped_share
        self.num_prefix_tokens = num_prefix_tokens
        self._draws, self._salt = RowDraws(), 0

    def forward(self, x_BND: Tensor) -> Tensor:
        if not self.training or self.dropped_share == 0.0:
            return x_BND
        batch, num_tokens, width = x_BND.shape
        num_patches = num_tokens - self.num_prefix_tokens
        num_kept = max(1, int(num_patches * (1 - self.dropped_share)))
        noise_BP = self._draws.uniform(self._salt, batch, num_patches, x_BND.device)
        kept_BK = noise_BP.topk(num_kept, dim=1).indices + self.num_prefix_tokens
        prefix = torch.arange(self.num_prefix_tokens, device=x_BND.device).expand(batch, -1)
        index = torch.cat([prefix, kept_BK], dim=1).unsqueeze(-1).expand(-1, -1, width)
        return x_BND.gather(1, index)


def draw_by_rows(model: nn.Module) -> RowDraws:
    """Lets all dropping layers of `model`, timm's too, draw by the keys of the returned object."""
    draws = RowDraws()
    for layer, (name, module) in enumerate(list(model.named_modules())):
        by_rows = _by_rows(module, draws, layer)
        if by_rows is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, by_rows.train(module.training))
    return draws


def _by_rows(module: nn.Module, draws: RowDraws, layer: int) -> nn.Module | None:
    """The layer that takes the place of `module`; None for those that draw nothing."""
    kind = type(module).__name__ if type(module).__module__.startswith("timm.") else type(module)
    if kind is nn.Dropout and module.p > 0:  # type: ignore[operator]
        return RowDropout(module.p, draws, layer)  # type: ignore[arg-type]
    if kind == "DropPath" and module.drop_prob > 0:  # type: ignore[operator]
        return RowDropPath(module.drop_prob, draws, layer)  # type: ignore[arg-type]
    if kind == "PatchDropout" and module.prob > 0:  # type: ignore[operator]
        module = PatchDropout(module.prob, module.num_prefix_tokens)  # type: ignore[arg-type]
    if isinstance(module, PatchDropout):
        module._draws, module._salt = draws, layer_salt(layer)
        return module
    return None


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Shifted to the right, zeros from the left: torch's own shift of int64 repeats the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)
