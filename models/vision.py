"""The native vision transformer, under OpenCLIP's parameter names. Knows its own configuration only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.config import VisionConfig, pair
from models.layer_groups import Prefixes, stack_groups
from models.layers import LayerNorm, ResidualAttentionBlock, Transformer, activation_factory
from models.row_draws import PatchDropout


class VisionTransformer(nn.Module):
    """Patches, a class token and learnt positions through pre-norm blocks to one feature an image.

    Initialisation: positions, class token and projection from N(0, 1 / width), the rest as torch does
    (the published models were trained so).
    """

    def __init__(self, config: VisionConfig, embed_dim: int, quick_gelu: bool) -> None:
        super().__init__()
        width, scale = config.width, config.width**-0.5
        self.image_size = pair(config.image_size)
        self.patch_size = pair(config.patch_size)  # type: ignore[arg-type]
        self.grid_size = (self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1])
        self.pool_type = config.pool_type
        self.final_ln_after_pool = config.final_ln_after_pool
        norm_eps = config.norm_kwargs.eps if config.norm_kwargs else 1e-5

        num_tokens = self.grid_size[0] * self.grid_size[1] + 1
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(num_tokens, width))
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))
        self.conv1 = nn.Conv2d(3, width, kernel_size=self.patch_size, stride=self.patch_size, bias=False)
        self.patch_dropout = PatchDropout(config.patch_dropout)
        self.ln_pre = nn.Identity() if config.no_ln_pre else LayerNorm(width, eps=norm_eps)
        self.transformer = Transformer(_blocks(config, quick_gelu, norm_eps))
        self.ln_post = LayerNorm(width, eps=norm_eps)

    def forward(self, image: Tensor) -> Tensor:
        """Normalised images [B,3,h,w] to features [B,E], not normalised. Raises ValueError for another size."""
        if tuple(image.shape[-2:]) != self.image_size:
            raise ValueError(f"this tower takes images of {self.image_size}, got {tuple(image.shape[-2:])}")
        hidden_BND = self.ln_pre(self.patch_dropout(self._embed(image)))
        hidden_BND = self.transformer(hidden_BND)
        return self._pool(hidden_BND) @ self.proj

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.transformer.grad_checkpointing = enable

    def blocks(self) -> list[nn.Module]:
        return list(self.transformer.resblocks)

    def no_weight_decay(self) -> set[str]:
        return {"class_embedding", "positional_embedding"}

    def layer_groups(self) -> Prefixes:
        stem = ("conv1", "class_embedding", "positional_embedding", "ln_pre")
        return stack_groups(stem, "transformer.resblocks", len(self.blocks()), ("ln_post",), "proj")

    def _embed(self, image: Tensor) -> Tensor:
        patches_BND = self.conv1(image).flatten(2).transpose(1, 2)
        dtype = patches_BND.dtype
        class_B1D = self.class_embedding.to(dtype).expand(patches_BND.shape[0], 1, -1)
        return torch.cat([class_B1D, patches_BND], dim=1) + self.positional_embedding.to(dtype)

    def _pool(self, hidden_BND: Tensor) -> Tensor:
        """[B,N,D] to [B,D]. A layer norm acts on each token alone, so the class token is picked before it."""
        if self.pool_type == "tok":
            return self.ln_post(hidden_BND[:, 0])
        if self.final_ln_after_pool:
            return self.ln_post(hidden_BND[:, 1:].mean(dim=1))
        return self.ln_post(hidden_BND)[:, 1:].mean(dim=1)


def _blocks(config: VisionConfig, quick_gelu: bool, norm_eps: float) -> list[ResidualAttentionBlock]:
    approximate = config.act_kwargs.approximate if config.act_kwargs else "none"
    activation = activation_factory(quick_gelu, approximate)
    heads = config.width // config.head_width
    return [
        ResidualAttentionBlock(config.width, heads, config.mlp_ratio, activation, norm_eps, config.ls_init_value)
        for _ in range(config.layers)  # type: ignore[arg-type]
    ]
