"""The native text tower. Its parameters live under a module of their own or at the top level of CLIP.

OpenCLIP has both layouts (`text.transformer...` and `transformer...`), so the parameters and their forward
pass are one base class that either module inherits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import TextConfig
from models.layer_groups import Prefixes, stack_groups
from models.layers import LayerNorm, ResidualAttentionBlock, Transformer, activation_factory
from models.unpadded import TextPlan, plan_text, why_padding_counts


class TextLayers(nn.Module):
    """The parameters of a text tower and what they compute; `add_text_layers` makes them attributes of self."""

    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter
    transformer: Transformer
    ln_final: LayerNorm
    text_projection: nn.Linear | nn.Parameter | None
    cls_emb: nn.Parameter | None

    def add_text_layers(self, config: TextConfig, embed_dim: int, quick_gelu: bool) -> None:
        """Creates the parameters, initialised as OpenCLIP does (standard deviations after Radford et al. 2021)."""
        self.text_config = config
        norm_eps = config.norm_kwargs.eps if config.norm_kwargs else 1e-5
        num_positions = config.context_length + config.embed_cls
        self.positional_embedding = nn.Parameter(torch.empty(num_positions, config.width))
        self.cls_emb = nn.Parameter(torch.empty(config.width)) if config.embed_cls else None
        self.text_projection = _projection(config, embed_dim)
        self.transformer = Transformer(_blocks(config, quick_gelu, norm_eps))
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.ln_final = LayerNorm(config.width, eps=norm_eps)
        self._init_text_layers(config)

    @property
    def ignores_padding(self) -> bool:
        """Whether what follows the pooled token cannot reach the features, so that it may be cut off."""
        return why_padding_counts(self.text_config) is None

    def plan_text(self, tokens: Tensor, multiple: int = 1) -> TextPlan:
        """How to run token ids [B,L] without what follows the pooled ones. Tokens and plan are on the host.

        Exact for any ids: a row without an end-of-text token is cut where it would be pooled. The number of tokens
        is a multiple of `multiple`. Raises ValueError for a tower in which padding counts.
        """
        if reason := why_padding_counts(self.text_config):
            raise ValueError(f"this tower needs all positions: {reason}")
        return plan_text(self._pooled_positions(tokens) + 1, tokens.shape[1], multiple=multiple)

    def layer_groups(self) -> Prefixes:
        """See `models.layer_groups`."""
        stem = ("token_embedding", "positional_embedding", "cls_emb")
        return stack_groups(
            stem, "transformer.resblocks", len(self.transformer.resblocks), ("ln_final",), "text_projection"
        )

    def text_features(self, tokens: Tensor, plan: TextPlan | None = None) -> Tensor:
        """Token ids [B,L] to features [B,E], not normalised; with the `plan` of these tokens, without padding.

        L may be shorter than the context where the tower ignores padding: positions are counted from the
        start, and the result equals that of the padded rows. Raises ValueError for any other length.
        """
        length, context_length = tokens.shape[1], self.text_config.context_length
        if length > context_length or (length < context_length and not self.ignores_padding):
            raise ValueError(f"this tower takes {context_length} tokens, got {length}")
        pooled_BD = self._pooled(tokens) if plan is None else self._pooled_unpadded(tokens, plan)
        # A layer norm acts on each token alone, so only the pooled one needs it.
        return self._projected(self.ln_final(pooled_BD))

    def features_and_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [B,L] to features [B,E], not normalised, and each token as a decoder sees it [B,L,D]."""
        hidden_BLD = self._hidden(tokens)
        if self.cls_emb is not None:
            # What a class token pools is normalised, the tokens themselves are not.
            return self._projected(self.ln_final(hidden_BLD[:, -1])), hidden_BLD[:, :-1]
        hidden_BLD = self.ln_final(hidden_BLD)
        rows = torch.arange(len(tokens), device=tokens.device)
        return self._projected(hidden_BLD[rows, self._pooled_positions(tokens)]), hidden_BLD

    def _projected(self, pooled_BD: Tensor) -> Tensor:
        if self.text_projection is None:
            return pooled_BD
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(pooled_BD)
        return pooled_BD @ self.text_projection

    def text_blocks(self) -> list[nn.Module]:
        """The repeated blocks: the units to compile, shard and recompute."""
        return list(self.transformer.blocks())

    def set_text_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass instead of keeping its activations."""
        self.transformer.grad_checkpointing = enable

    def _pooled(self, tokens: Tensor) -> Tensor:
        hidden_BLD = self._hidden(tokens)
        if self.cls_emb is not None:
            return hidden_BLD[:, -1]
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        return hidden_BLD[rows, self._pooled_positions(tokens)]

    def _hidden(self, tokens: Tensor) -> Tensor:
        """[B,L] to [B,L,D], or [B,L+1,D] where a class token stands at the end."""
        hidden_BLD, is_causal, mask = self.token_embedding(tokens), not self.text_config.no_causal_mask, None
        if self.cls_emb is not None:
            class_B1D = self.cls_emb.to(hidden_BLD.dtype).expand(tokens.shape[0], 1, -1)
            hidden_BLD = torch.cat([hidden_BLD, class_B1D], dim=1)
            mask, is_causal = self._class_token_mask(tokens, is_causal), False
        hidden_BLD = hidden_BLD + self.positional_embedding[: hidden_BLD.shape[1]]
        return self.transformer(hidden_BLD, is_causal=is_causal, mask=mask)

    def _class_token_mask(self, tokens: Tensor, is_causal: bool) -> Tensor:
        """Who sees whom [B,1,L+1,L+1]: all what is before, and nobody padding.

        OpenCLIP's weights are trained with the mask of the padding one place late, so that the place behind a text's
        end is seen, and the class token itself is not where a text is padded.
        """
        num_tokens = tokens.shape[1] + 1
        seen_BL = F.pad(tokens != self.text_config.pad_id, (1, 0), value=True)
        mask_B1LL = seen_BL[:, None, None, :].expand(-1, 1, num_tokens, -1)
        return mask_B1LL.tril() if is_causal else mask_B1LL

    def _pooled_unpadded(self, tokens: Tensor, plan: TextPlan) -> Tensor:
        # One look-up for all groups: the gradient of each is as large as the vocabulary.
        embedded_TD = self.token_embedding(tokens.flatten().index_select(0, plan.index))
        parts = plan.groups.split(embedded_TD)
        hidden_TD = plan.groups.join(part + self.positional_embedding[: part.shape[1]] for part in parts)
        hidden_TD = self.transformer(hidden_TD, is_causal=True, groups=plan.groups)
        return hidden_TD.index_select(0, plan.pooled)

    def _pooled_positions(self, tokens: Tensor) -> Tensor:
        """Which position [B] of each row of tokens [B,L] is pooled."""
        pool_type = self.text_config.pool_type
        if pool_type in ("first", "last"):
            return torch.full_like(tokens[:, 0], 0 if pool_type == "first" else tokens.shape[1] - 1)
        # The end-of-text id is the largest of the vocabulary, so its first position is the argmax.
        marks = tokens if pool_type == "argmax" else (tokens == self.text_config.eos_id).int()
        return marks.argmax(dim=-1)

    def _init_text_layers(self, config: TextConfig) -> None:
        in_std = config.width**-0.5
        out_std = in_std * (2 * config.layers) ** -0.5
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        if self.cls_emb is not None:
            nn.init.normal_(self.cls_emb, std=0.01)
        for block in self.transformer.blocks():
            nn.init.normal_(block.attn.in_proj_weight, std=in_std)
            nn.init.normal_(block.attn.out_proj.weight, std=out_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * config.width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=out_std)
        if isinstance(self.text_projection, nn.Linear):
            nn.init.normal_(self.text_projection.weight, std=in_std)
            nn.init.zeros_(self.text_projection.bias)
        elif self.text_projection is not None:
            nn.init.normal_(self.text_projection, std=in_std)


class TextTower(TextLayers):
    """A text tower as a module of its own (OpenCLIP's custom_text layout, keys under `text.`)."""

    def __init__(self, config: TextConfig, embed_dim: int, quick_gelu: bool) -> None:
        super().__init__()
        self.add_text_layers(config, embed_dim, quick_gelu)

    def forward(self, tokens: Tensor, plan: TextPlan | None = None) -> Tensor:
        return self.text_features(tokens, plan)


def _projection(config: TextConfig, embed_dim: int) -> nn.Linear | nn.Parameter | None:
    if config.proj_type == "none":
        return None
    if config.proj_bias:
        return nn.Linear(config.width, embed_dim)
    return nn.Parameter(torch.empty(config.width, embed_dim))


def _blocks(config: TextConfig, quick_gelu: bool, norm_eps: float) -> list[ResidualAttentionBlock]:
    approximate = config.act_kwargs.approximate if config.act_kwargs else "none"
    activation = activation_factory(quick_gelu, approximate)
    return [
        ResidualAttentionBlock(config.width, config.heads, config.mlp_ratio, activation, norm_eps, config.ls_init_value)
        for _ in range(config.layers)
    ]
