"""CLIP: an image tower, a text tower and a temperature. Knows no rank, no file, no loss.

The state dict has OpenCLIP's keys, in both of its layouts (text unpacked at the top level, or under `text.`).

Shape legend of this package: B images or texts of this rank's micro-batch, S image side, N vision tokens,
L text tokens, D tower width, E embedding size, H heads, K head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig, TextConfig, VisionConfig
from models.errors import ConfigError
from models.resnet import ModifiedResNet
from models.row_draws import draw_by_rows
from models.text import TextLayers, TextTower
from models.unpadded import TextPlan
from models.vision import VisionTransformer

if TYPE_CHECKING:
    from models.hf_text import HFTextTower
    from models.timm_tower import TimmTower

ImageTower: TypeAlias = "VisionTransformer | ModifiedResNet | TimmTower"


class CLIP(TextLayers):
    """Both towers. Call the module, not its encode methods, when it is wrapped (DDP, FSDP): wrappers see `forward`.

    Parameters are fp32 and initialised from torch's current generator, on torch's current default device.
    Raises ConfigError for settings that no tower here has.
    """

    logit_bias: nn.Parameter | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        _refuse_unsupported(config)
        self.config = config
        self.logit_scale = nn.Parameter(torch.tensor(config.init_logit_scale))
        self.logit_bias = None if config.init_logit_bias is None else nn.Parameter(torch.tensor(config.init_logit_bias))
        self.visual: ImageTower = _build_visual(config)
        if config.custom_text:
            self.text = _build_text(config)
        else:
            self.add_text_layers(config.text_cfg, config.embed_dim, config.quick_gelu)
        self.row_draws = draw_by_rows(self)
        self._frozen_statistics: list[nn.Module] = []

    def forward(
        self, image: Tensor | None = None, text: Tensor | None = None, text_plan: TextPlan | None = None
    ) -> tuple[Tensor | None, ...]:
        """Features of what is given: (image [B,E] or None, text [B,E] or None, scale[, bias if the model has one]).

        Features have length 1, in fp32 under autocast too; `scale` is the exponential of the `logit_scale` parameter.
        `text_plan`: see `encode_text`.
        """
        image_features = None if image is None else self.encode_image(image, normalize=True)
        text_features = None if text is None else self.encode_text(text, normalize=True, plan=text_plan)
        scale = self.logit_scale.exp()
        if self.logit_bias is None:
            return image_features, text_features, scale
        return image_features, text_features, scale, self.logit_bias

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Normalised pixels [B,3,S,S] to features [B,E], of length 1 and fp32 if `normalize`."""
        features = self.visual(image)
        return unit_length(features) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False, plan: TextPlan | None = None) -> Tensor:
        """Token ids [B,L] to features [B,E], of length 1 and fp32 if `normalize`.

        L may be anything up to the context length that holds every end-of-text token (see `ignores_padding`).
        With the plan that `text_tower.plan_text` made of these tokens, the tower runs without their padding.
        """
        features = self.text_tower.text_features(tokens, plan)
        return unit_length(features) if normalize else features

    @property
    def text_tower(self) -> TextLayers | HFTextTower:
        """Where the text parameters are: this module, or its `text`."""
        return self.text if self.config.custom_text else self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block of both towers in the backward pass instead of keeping its activations."""
        self.visual.set_grad_checkpointing(enable)
        self.text_tower.set_text_checkpointing(enable)

    def freeze_statistics(self, norms: Iterable[nn.Module]) -> None:
        """Batch norms that from now on stay in evaluation mode, whatever the model's mode is."""
        self._frozen_statistics += norms
        self.train(self.training)

    def train(self, mode: bool = True) -> CLIP:
        super().train(mode)
        for norm in self._frozen_statistics:
            norm.eval()
        return self

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks of both towers, image first: the units to compile, shard and recompute."""
        return [*self.visual.blocks(), *self.text_tower.text_blocks()]

    def no_weight_decay(self) -> set[str]:
        """State-dict keys of parameters with two or more dimensions that should not decay, and the temperature's."""
        text_key = "text.positional_embedding" if self.config.custom_text else "positional_embedding"
        visual_keys = {f"visual.{name}" for name in self.visual.no_weight_decay()}
        declared = {text_key, "logit_scale", "logit_bias"} | visual_keys
        return declared & {name for name, _ in self.named_parameters()}


def _build_visual(config: ModelConfig) -> ImageTower:
    vision = config.vision_cfg
    if vision.timm_model_name:
        # Imported here because timm takes seconds to import and the native towers do not need it.
        from models.timm_tower import TimmTower

        return TimmTower(vision, config.embed_dim)
    if isinstance(vision.layers, tuple):
        return ModifiedResNet(vision, config.embed_dim)
    return VisionTransformer(vision, config.embed_dim, config.quick_gelu)


def _build_text(config: ModelConfig) -> TextTower | HFTextTower:
    if config.text_cfg.hf_model_name:
        # Imported here because it is an extra, and takes seconds.
        from models.hf_text import HFTextTower

        return HFTextTower(config.text_cfg, config.embed_dim)
    return TextTower(config.text_cfg, config.embed_dim, config.quick_gelu)


def unit_length(features: Tensor) -> Tensor:
    """Features [B,E] divided by their lengths, in fp32 unless they are more precise."""
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)


def _refuse_unsupported(config: ModelConfig) -> None:
    text = config.text_cfg
    _refuse("vision_cfg", config.vision_cfg, VisionConfig(), ("pos_embed_type",))
    custom = (
        "block_type",
        "qk_norm",
        "scaled_cosine_attn",
        "scale_heads",
        "scale_attn_inner",
        "scale_attn",
        "scale_fc",
    )
    _refuse("vision_cfg", config.vision_cfg, VisionConfig(), custom)
    _refuse("text_cfg", text, TextConfig(), custom)
    if isinstance(config.vision_cfg.attentional_pool, str):
        raise ConfigError("vision_cfg.attentional_pool: true is supported, no other way of pooling by attention is")
    _one_of("vision_cfg.pool_type", config.vision_cfg.pool_type, ("tok", "avg"))
    _one_of("text_cfg.pool_type", text.pool_type, ("argmax", "first", "last", "eos"))
    _one_of("text_cfg.proj_type", text.proj_type, ("linear", "none"))
    if text.proj_type == "none" and text.width != config.embed_dim:
        raise ConfigError(f"text_cfg.proj_type none needs text_cfg.width {text.width} equal to embed_dim")


def _refuse(path: str, section: object, default: object, keys: tuple[str, ...]) -> None:
    for key in keys:
        value = getattr(section, key)
        if value != getattr(default, key):
            raise ConfigError(f"{path}.{key}: {value!r} is not supported by the towers of this package")


def _one_of(path: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{path}: {value!r} is none of {', '.join(choices)}")
