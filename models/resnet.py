"""The ModifiedResNet of OpenAI's CLIP (Radford et al. 2021, section 2.4), under OpenCLIP's parameter names.

A ResNet with three stem convolutions, average pooling before every strided convolution, and attention
instead of a global average. Knows its own configuration only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from models.config import VisionConfig, pair
from models.layer_groups import Prefixes


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut; a stride is an average pool after the 3x3."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride)
        # Each block starts as its shortcut.
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.avgpool(F.relu(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(out + shortcut)


class AttentionPool(nn.Module):
    """One query, the mean over the grid, attends to itself and every grid cell."""

    def __init__(self, num_cells: int, width: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(num_cells + 1, width) * width**-0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(linear.weight, std=width**-0.5)

    def forward(self, x_BDhw: Tensor) -> Tensor:
        cells_BND = x_BDhw.flatten(2).transpose(1, 2)
        tokens_BND = torch.cat([cells_BND.mean(dim=1, keepdim=True), cells_BND], dim=1)
        tokens_BND = tokens_BND + self.positional_embedding.to(tokens_BND.dtype)
        query = self._split(self.q_proj(tokens_BND[:, :1]))
        key, value = self._split(self.k_proj(tokens_BND)), self._split(self.v_proj(tokens_BND))
        pooled_BH1K = F.scaled_dot_product_attention(query, key, value)
        return self.c_proj(pooled_BH1K.flatten(1))

    def _split(self, x_BND: Tensor) -> Tensor:
        """[B,N,D] to [B,H,N,K]."""
        return x_BND.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ModifiedResNet(nn.Module):
    """Images to one feature each, through a stem, four stages of bottlenecks and attention pooling."""

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        width = config.width
        self.image_size = pair(config.image_size)
        self.grid_size = (self.image_size[0] // 32, self.image_size[1] // 32)
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        depths: tuple[int, ...] = config.layers  # type: ignore[assignment]
        self.layer1 = _stage(width, width, depths[0], stride=1)
        self.layer2 = _stage(4 * width, 2 * width, depths[1], stride=2)
        self.layer3 = _stage(8 * width, 4 * width, depths[2], stride=2)
        self.layer4 = _stage(16 * width, 8 * width, depths[3], stride=2)
        heads = 32 * width // config.head_width
        self.attnpool = AttentionPool(self.grid_size[0] * self.grid_size[1], 32 * width, heads, embed_dim)

    def forward(self, image: Tensor) -> Tensor:
        """Normalised images [B,3,h,w] to features [B,E], not normalised."""
        x = self._stem(image)
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        for block in self.blocks():
            if recompute:
                contexts = partial(_checkpoint_contexts, block)
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
            else:
                x = block(x)
        return self.attnpool(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def blocks(self) -> list[nn.Module]:
        return [*self.layer1, *self.layer2, *self.layer3, *self.layer4]

    def no_weight_decay(self) -> set[str]:
        return {"attnpool.positional_embedding"}

    def layer_groups(self) -> Prefixes:
        stem = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")
        return [stem, ("layer1",), ("layer2",), ("layer3",), ("layer4",), ("attnpool",)]

    def _stem(self, image: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(image)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return F.avg_pool2d(x, 2)


@contextmanager
def frozen_batch_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms inside normalise as before but leave their running statistics alone.

    For a forward pass that is done twice (activation checkpointing, accumulation), which would count each batch twice.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # Not `track_running_stats`: that would save fewer tensors than the first pass did.
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, num_batches) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches


def _checkpoint_contexts(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """What surrounds a checkpointed block's forward pass, and its recomputation."""
    return nullcontext(), frozen_batch_statistics(block)


def _stage(in_channels: int, channels: int, depth: int, stride: int) -> nn.Sequential:
    first = Bottleneck(in_channels, channels, stride)
    rest = [Bottleneck(channels * Bottleneck.expansion, channels) for _ in range(depth - 1)]
    return nn.Sequential(first, *rest)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    # The pool has no parameters; its name keeps the convolution at "0" as in the published weights.
    layers = OrderedDict[str, nn.Module]()
    layers["-1"] = nn.AvgPool2d(stride)
    layers["0"] = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    layers["1"] = nn.BatchNorm2d(out_channels)
    return nn.Sequential(layers)
