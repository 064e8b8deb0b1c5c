"""CoCa: CLIP with a decoder that writes captions (Yu et al. 2022, "CoCa: Contrastive captioners are image-text
foundation models", section 3). OpenCLIP's key layout; knows no loss and no sampling.

The image tower gives tokens beside its feature, the text tower those of its causal half; the decoder mixes both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.clip import CLIP, unit_length
from models.config import ModelConfig, MultimodalConfig
from models.errors import ConfigError
from models.layers import CrossAttentionBlock, LayerNorm, ResidualAttentionBlock, activation_factory
from models.text import TextTower
from models.unpadded import TextPlan
from models.vision import VisionTransformer


class Decoder(nn.Module):
    """Causal blocks over a caption's tokens, each followed by one that looks at the image.

    Initialised as OpenCLIP's blocks are. Its output matrix OpenCLIP leaves as memory happens to be; here it is drawn
    as the formula in OpenCLIP's own, never called, initialisation says: N(0, 1 / width).
    """

    def __init__(self, config: MultimodalConfig, vocab_size: int, quick_gelu: bool) -> None:
        super().__init__()
        shape = (
            config.width,
            config.heads,
            config.mlp_ratio,
            activation_factory(quick_gelu),
            1e-5,
            config.ls_init_value,
        )
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(*shape) for _ in range(config.layers))
        self.cross_attn = nn.ModuleList(CrossAttentionBlock(*shape) for _ in range(config.layers))
        self.ln_final = LayerNorm(config.width)
        self.text_projection = nn.Parameter(torch.empty(config.width, vocab_size))
        nn.init.normal_(self.text_projection, std=config.width**-0.5)
        self.grad_checkpointing = False

    def forward(self, image_BND: Tensor, text_BLD: Tensor) -> Tensor:
        """Image tokens and the embedded caption so far to logits [B,L,V] of each next token."""
        hidden_BLD, recompute = text_BLD, self.grad_checkpointing and torch.is_grad_enabled()
        for block, cross in zip(self.resblocks, self.cross_attn, strict=True):
            if recompute:
                hidden_BLD = checkpoint(block, hidden_BLD, True, use_reentrant=False, preserve_rng_state=False)
                hidden_BLD = checkpoint(cross, hidden_BLD, image_BND, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden_BLD = cross(block(hidden_BLD, is_causal=True), image_BND)
        return self.ln_final(hidden_BLD) @ self.text_projection

    def blocks(self) -> list[nn.Module]:
        return [block for pair in zip(self.resblocks, self.cross_attn, strict=True) for block in pair]


class CoCa(CLIP):
    """CLIP's two towers and a decoder. Raises ConfigError for towers that give no tokens."""

    visual: VisionTransformer
    text: TextTower

    def __init__(self, config: ModelConfig) -> None:
        if config.text_cfg.hf_model_name:
            raise ConfigError("multimodal_cfg: a decoder behind a Hugging Face text tower is not supported")
        super().__init__(config)
        assert config.multimodal_cfg is not None
        if not isinstance(self.visual, VisionTransformer):
            raise ConfigError("multimodal_cfg: CoCa needs a native vision transformer, which gives image tokens")
        decoder_width = config.multimodal_cfg.width
        for name, width in (("vision_cfg", self.visual.token_width), ("text_cfg", config.text_cfg.width)):
            if width != decoder_width:
                raise ConfigError(f"multimodal_cfg.width {decoder_width}: the tokens of {name} have width {width}")
        self.text_decoder = Decoder(config.multimodal_cfg, config.text_cfg.vocab_size, config.quick_gelu)

    def forward(
        self, image: Tensor | None = None, text: Tensor | None = None, text_plan: TextPlan | None = None
    ) -> tuple[Tensor | None, ...]:
        """(image [B,E], text [B,E], scale, bias or None, logits [B,L-1,V] of tokens 1, 2, ... of each text).

        What is not given has no feature, and without both there are no logits. Features have length 1.
        """
        image_features = image_tokens = text_features = text_tokens = logits = None
        if image is not None:
            image_features, image_tokens = self.visual.features_and_tokens(image)
        if text is not None:
            text_features, text_tokens = self.text.features_and_tokens(text)
        if image_tokens is not None and text_tokens is not None:
            # The last token has no next one.
            logits = self.text_decoder(image_tokens, text_tokens[:, :-1])
        units = (None if features is None else unit_length(features) for features in (image_features, text_features))
        return *units, self.logit_scale.exp(), self.logit_bias, logits

    def next_logits(self, image_tokens: Tensor, tokens: Tensor) -> Tensor:
        """Logits [B,V] of what follows the token ids [B,L], with the image tokens of `visual.features_and_tokens`."""
        _, text_tokens = self.text.features_and_tokens(tokens)
        return self.text_decoder(image_tokens, text_tokens)[:, -1]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        self.text_decoder.grad_checkpointing = enable

    def blocks(self) -> list[nn.Module]:
        return [*super().blocks(), *self.text_decoder.blocks()]
