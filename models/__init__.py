"""Models: configurations, towers, tokenizer, inference transform, weights in. Knows no rank and no shard.

Names are imported on first use: an error class or a list of names must not cost an import of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.clip import CLIP
    from models.config import ModelConfig, PreprocessConfig, TextConfig, VisionConfig, config_with, pair
    from models.errors import CheckpointError, ConfigError
    from models.factory import (
        build_model,
        create_model,
        create_model_and_transforms,
        get_tokenizer,
        load_published_text,
    )
    from models.hf_tokenizer import HFTokenizer
    from models.positions import Resized
    from models.preprocess import InferenceTransform, TrainTransform, normalize
    from models.provenance import Provenance, TokenizerIdentity, parse_provenance, read_provenance, with_preprocess_of
    from models.registry import list_models, load_model_config
    from models.tokenizer import ClipTokenizer, Tokenizer
    from models.unpadded import TextPlan, why_padding_counts
    from models.weight_files import read_weights
    from models.weights import PretrainedReport, load_pretrained

_HOMES = {
    "clip": ("CLIP",),
    "config": (
        "ModelConfig",
        "PreprocessConfig",
        "TextConfig",
        "VisionConfig",
        "config_with",
        "pair",
    ),
    "errors": (
        "CheckpointError",
        "ConfigError",
    ),
    "factory": (
        "build_model",
        "create_model",
        "create_model_and_transforms",
        "get_tokenizer",
        "load_published_text",
    ),
    "hf_tokenizer": ("HFTokenizer",),
    "positions": ("Resized",),
    "preprocess": (
        "InferenceTransform",
        "TrainTransform",
        "normalize",
    ),
    "provenance": (
        "Provenance",
        "TokenizerIdentity",
        "parse_provenance",
        "read_provenance",
        "with_preprocess_of",
    ),
    "registry": (
        "list_models",
        "load_model_config",
    ),
    "tokenizer": (
        "ClipTokenizer",
        "Tokenizer",
    ),
    "unpadded": (
        "TextPlan",
        "why_padding_counts",
    ),
    "weight_files": ("read_weights",),
    "weights": (
        "PretrainedReport",
        "load_pretrained",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CLIP",
    "CheckpointError",
    "ClipTokenizer",
    "ConfigError",
    "HFTokenizer",
    "InferenceTransform",
    "ModelConfig",
    "PreprocessConfig",
    "PretrainedReport",
    "Provenance",
    "Resized",
    "TextConfig",
    "TextPlan",
    "Tokenizer",
    "TokenizerIdentity",
    "TrainTransform",
    "VisionConfig",
    "build_model",
    "config_with",
    "create_model",
    "create_model_and_transforms",
    "get_tokenizer",
    "list_models",
    "load_model_config",
    "load_pretrained",
    "load_published_text",
    "normalize",
    "pair",
    "parse_provenance",
    "read_provenance",
    "read_weights",
    "why_padding_counts",
    "with_preprocess_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'models' has no attribute {name!r}")
    value = getattr(import_module(f"models.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
