"""From a name to a model, its transforms and its tokenizer, in the manner OpenCLIP's users know."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.clip import CLIP
from models.config import ModelConfig, config_with
from models.preprocess import InferenceTransform, TrainTransform
from models.registry import load_model_config
from models.tokenizer import ClipTokenizer, build_tokenizer
from models.weights import load_pretrained

ImageTransform = Callable[..., Tensor]


def build_model(config: ModelConfig) -> CLIP:
    """The model of a configuration: fp32, freshly initialised from torch's current random state.

    It is made on torch's default device, so `with torch.device("meta")` gives shapes without memory.
    Raises ConfigError.
    """
    if config.multimodal_cfg is not None:
        from models.coca import CoCa

        return CoCa(config)
    return CLIP(config)


def create_model(
    name: str,
    pretrained: str | None = None,
    device: str | torch.device = "cpu",
    force_image_size: int | Sequence[int] | None = None,
    force_context_length: int | None = None,
    force_quick_gelu: bool = False,
    force_patch_dropout: float | None = None,
) -> CLIP:
    """A model by name or configuration file, with weights if `pretrained` names a source; in training mode.

    Raises ConfigError for the model, CheckpointError for the weights.
    """
    config = config_with(
        load_model_config(name),
        image_size=force_image_size,
        context_length=force_context_length,
        quick_gelu=True if force_quick_gelu else None,
        patch_dropout=force_patch_dropout,
    )
    model = build_model(config)
    if pretrained:
        load_pretrained(model, pretrained)
    return model.to(device)


def create_model_and_transforms(
    name: str,
    pretrained: str | None = None,
    device: str | torch.device = "cpu",
    force_image_size: int | Sequence[int] | None = None,
    force_context_length: int | None = None,
    force_quick_gelu: bool = False,
    force_patch_dropout: float | None = None,
) -> tuple[CLIP, ImageTransform, ImageTransform]:
    """`create_model`, and its transforms for training and for inference: PIL image to [3,S,S] float."""
    model = create_model(
        name, pretrained, device, force_image_size, force_context_length, force_quick_gelu, force_patch_dropout
    )
    preprocess = model.config.preprocess
    return model, TrainTransform(preprocess), InferenceTransform(preprocess)


def get_tokenizer(name_or_config: str | ModelConfig, context_length: int | None = None) -> ClipTokenizer:
    """The tokenizer of a model, by its name or configuration. Raises ConfigError for one that is not CLIP's."""
    config = name_or_config if isinstance(name_or_config, ModelConfig) else load_model_config(name_or_config)
    return build_tokenizer(config.text_cfg, context_length)
