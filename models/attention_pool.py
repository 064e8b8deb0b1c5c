"""Pooling by learnt queries (Yu et al. 2022, "CoCa", section 3.2), under OpenCLIP's parameter names."""

from __future__ import annotations

import torch
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
        """Tokens [B,N,context_width] to one value for each query [B,Q,width]."""
        context_BND = self.ln_k(hidden_BND)
        query_BQD = self.ln_q(self.query).expand(len(hidden_BND), -1, -1)
        return self.attn(query_BQD, context_BND, context_BND, need_weights=False)[0]
