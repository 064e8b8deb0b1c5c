"""From a name to a model, its transforms and its tokenizer, in the manner OpenCLIP's users know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.clip import CLIP
from models.config import ModelConfig, config_with
from models.preprocess import InferenceTransform, TrainTransform
from models.provenance import read_provenance, with_preprocess_of
from models.registry import load_model_config
from models.tokenizer import ClipTokenizer, build_tokenizer
from models.weights import load_pretrained

if TYPE_CHECKING:
    from models.hf_text import HFTextTower
    from models.hf_tokenizer import HFTokenizer

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

    Weights that say how their images were prepared keep their numbers. A text tower of transformers has its
    published weights where there are no others, unless its configuration says hf_model_pretrained false.
    Raises ConfigError for the model, CheckpointError for the weights.
    """
    config = config_with(
        load_model_config(name),
        image_size=force_image_size,
        context_length=force_context_length,
        quick_gelu=True if force_quick_gelu else None,
        patch_dropout=force_patch_dropout,
    )
    model = build_model(with_preprocess_of(config, read_provenance(pretrained)) if pretrained else config)
    if pretrained:
        load_pretrained(model, pretrained)
    else:
        load_published_text(model)
    return model.to(device)


def load_published_text(model: CLIP) -> str | None:
    """The published weights of a text tower of transformers, if the configuration wants them: a line for the log.

    Raises ConfigError where they are not on this machine.
    """
    text = model.config.text_cfg
    if not text.hf_model_name or not text.hf_model_pretrained:
        return None
    tower: HFTextTower = model.text_tower  # type: ignore[assignment]
    return tower.load_published_weights()


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


def get_tokenizer(name_or_config: str | ModelConfig, context_length: int | None = None) -> ClipTokenizer | HFTokenizer:
    """The tokenizer of a model, by its name or configuration. Raises ConfigError where it does not fit."""
    config = name_or_config if isinstance(name_or_config, ModelConfig) else load_model_config(name_or_config)
    return build_tokenizer(config.text_cfg, context_length)
