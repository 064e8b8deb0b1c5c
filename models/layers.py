"""The transformer's parts, shared by the native towers. Knows no configuration, no file, no rank.

Parameter names and initialisation are OpenCLIP's (which are those of torch.nn.MultiheadAttention inside a
pre-norm block), the attention itself is one fused call. Shapes follow the legend in `models/clip.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ActivationFactory = Callable[[], nn.Module]


# Not frozen, though nothing writes to it: of a frozen one torch 2.8's compiler guards every field, so that blocks would
# be compiled again for each batch, not for each T.
@dataclass
class Groups:
    """What a line of T tokens consists of: parts of rows of equal length. shapes: (rows, tokens of each row)."""

    shapes: tuple[tuple[int, int], ...]

    def split(self, line: Tensor) -> list[Tensor]:
        """[T,...] to one [rows, tokens of each row,...] for each group, as views."""
        parts = line.split([rows * length for rows, length in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    @staticmethod
    def join(parts: Iterable[Tensor]) -> Tensor:
        """The inverse of `split`, as a copy."""
        return torch.cat([part.flatten(0, 1) for part in parts])


class LayerNorm(nn.LayerNorm):
    """Layer normalisation computed in the parameters' precision, returned in the input's."""

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.bias, self.eps)
        return normed.to(x.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation that OpenAI's weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class LayerScale(nn.Module):
    """A learnt factor for each channel (Touvron et al. 2021, CaiT, section 2)."""

    def __init__(self, width: int, init_value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init_value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    """Self-attention with one stacked projection for query, key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, x: Tensor, is_causal: bool = False, groups: Groups | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """[B,N,D], or with `groups` a line of tokens [T,D]; a token then sees those of its own row.

        mask: bool, broadcast to [B,H,N,N], true where a token is seen; instead of `is_causal`.
        """
        stacked = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        if groups is None:
            return self.out_proj(_attend(stacked, self.heads, is_causal, mask))
        return self.out_proj(_attend_in_groups(stacked, self.heads, is_causal, groups))


class CrossAttention(Attention):
    """Attention from one sequence to another of the same width, with the parameters of self-attention."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        """[B,L,D] looking at [B,N,D]."""
        width = x.shape[-1]
        query = F.linear(x, self.in_proj_weight[:width], self.in_proj_bias[:width])
        stacked = F.linear(context, self.in_proj_weight[width:], self.in_proj_bias[width:])
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, *stacked.chunk(2, dim=-1))
        )
        mixed_BHLK = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(mixed_BHLK.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, width: int, inner_width: int, activation: ActivationFactory) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, inner_width)
        self.gelu = activation()
        self.c_proj = nn.Linear(inner_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    """Pre-norm attention and MLP, each added to its input, each with an optional layer scale."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        activation: ActivationFactory,
        norm_eps: float = 1e-5,
        ls_init_value: float | None = None,
    ) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, heads)
        self.ls_1 = _layer_scale(width, ls_init_value)
        self.ln_2 = LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, int(width * mlp_ratio), activation)
        self.ls_2 = _layer_scale(width, ls_init_value)

    def forward(
        self, x: Tensor, is_causal: bool = False, groups: Groups | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """[B,N,D] or, with `groups`, [T,D]; see `Attention`."""
        x = x + self.ls_1(self.attn(self.ln_1(x), is_causal, groups, mask))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class CrossAttentionBlock(nn.Module):
    """Pre-norm attention to another sequence, which has a norm of its own, and MLP."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        activation: ActivationFactory,
        norm_eps: float = 1e-5,
        ls_init_value: float | None = None,
    ) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width, eps=norm_eps)
        self.attn = CrossAttention(width, heads)
        self.ls_1 = _layer_scale(width, ls_init_value)
        self.ln_1_kv = LayerNorm(width, eps=norm_eps)
        self.ln_2 = LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, int(width * mlp_ratio), activation)
        self.ls_2 = _layer_scale(width, ls_init_value)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """[B,L,D] looking at [B,N,D]."""
        x = x + self.ls_1(self.attn(self.ln_1(x), self.ln_1_kv(context)))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    """A stack of residual attention blocks, which recomputes them in the backward pass when asked."""

    def __init__(self, blocks: Iterable[ResidualAttentionBlock]) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def blocks(self) -> list[ResidualAttentionBlock]:
        return list(self.resblocks)  # type: ignore[arg-type]

    def forward(
        self, x: Tensor, is_causal: bool = False, groups: Groups | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """[B,N,D] or, with `groups`, [T,D]. Each block runs once either way, as sharded parameters need it."""
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        for block in self.resblocks:
            if recompute:
                # The blocks draw no random numbers, so there is no generator state to keep.
                x = checkpoint(block, x, is_causal, groups, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, is_causal, groups, mask)
        return x


def activation_factory(quick_gelu: bool, approximate: str = "none") -> ActivationFactory:
    """Builds the activation of a native tower's MLPs."""
    return QuickGELU if quick_gelu else lambda: nn.GELU(approximate=approximate)


def _layer_scale(width: int, init_value: float | None) -> nn.Module:
    return nn.Identity() if init_value is None else LayerScale(width, init_value)


def _attend(stacked_BN3D: Tensor, heads: int, is_causal: bool, mask: Tensor | None = None) -> Tensor:
    """Query, key and value side by side [B,N,3D] to the mixed values [B,N,D]."""
    batch, num_tokens, _ = stacked_BN3D.shape
    query, key, value = stacked_BN3D.view(batch, num_tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)  # 3 x [B,H,N,K]
    mixed_BHNK = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)
    return mixed_BHNK.transpose(1, 2).reshape(batch, num_tokens, -1)


# Not traced: groups differ from batch to batch, and a graph would hold for theirs alone. What surrounds this call
# is compiled for any T. Groups are an object and not a tuple because the compiler looks into tuples that pass by.
@torch.compiler.disable
def _attend_in_groups(stacked_T3D: Tensor, heads: int, is_causal: bool, groups: Groups) -> Tensor:
    return groups.join(_attend(part_BN3D, heads, is_causal) for part_BN3D in groups.split(stacked_T3D))
