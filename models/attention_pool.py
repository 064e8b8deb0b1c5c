"""Pooling by learnt queries (Yu et al. 2022, "CoCa", section 3.2), under OpenCLIP's parameter names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import LayerNorm


class AttentionalPooler(nn.Module):
    """`num_queries` queries of width `width` each look at all tokens of width `context_width`.

    Queries begin as N(0, 1), the rest as torch.nn.MultiheadAttention does.
    """

    def __init__(self, width: int, context_width: int, heads: int, num_queries: int, norm_eps: float) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(num_queries, width))
        self.attn = nn.MultiheadAttention(width, heads, kdim=context_width, vdim=context_width, batch_first=True)
        self.ln_q = LayerNorm(width, eps=norm_eps)
        self.ln_k = LayerNorm(context_width, eps=norm_eps)

    def forward(self, hidden_BND: Tensor) -> Tensor:
        """Tokens [B,N,context_width] to one value for each query [B,Q,width].

        The queries are projected once for all images. The module's own forward pass would do that for each, and
        counts rows in numbers that an exported graph would keep.
        """
        context_BND, query_1QD = self.ln_k(hidden_BND), self.ln_q(self.query)[None]
        inputs = (query_1QD, context_BND, context_BND)
        query, key, value = (
            F.linear(x, weight, bias).unflatten(-1, (self.attn.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in zip(inputs, self._weights(), self.attn.in_proj_bias.chunk(3), strict=True)
        )
        query = query.expand(hidden_BND.shape[0], -1, -1, -1)
        mixed_BHQK = F.scaled_dot_product_attention(query, key, value)
        return self.attn.out_proj(mixed_BHQK.transpose(1, 2).flatten(2))

    def _weights(self) -> tuple[Tensor, ...]:
        """Of query, key and value, which are one tensor where both widths are the same."""
        attn = self.attn
        if attn._qkv_same_embed_dim:
            return attn.in_proj_weight.chunk(3)
        return attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight
