"""What is known of where weights come from: the configuration that lies beside them, or traces in the tensors.

Read-only, and from small JSON files alone. Knows three kinds of folders: checkpoints of this package
(model_config.json), OpenCLIP's (open_clip_config.json) and transformers' (config.json). A file's own folder counts
too. Which of a model's settings leave no trace in the shapes of its weights is said here, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models.config import ActivationConfig, ModelConfig, NormConfig, TextConfig, VisionConfig, pair
from models.errors import ConfigError

CONFIG_FILES = ("model_config.json", "open_clip_config.json", "config.json")
# OpenAI stored these numbers beside its weights, all of which use QuickGELU.
OPENAI_TENSORS = ("input_resolution", "context_length", "vocab_size")

# What may differ between the run that made the weights and the one that goes on with them.
_FREE = ("image_size", "patch_dropout", "output_tokens", "timm_drop", "timm_drop_path", "timm_model_pretrained")
_FREE_TEXT = ("context_length", "output_tokens", "hf_model_pretrained", "hf_tokenizer_name", "tokenizer_kwargs")
_DEFAULTS = {"act_kwargs": ActivationConfig(), "norm_kwargs": NormConfig()}


@dataclass(frozen=True)
class Origin:
    """What made the weights, as far as `evidence` shows: a file's name, or what was found in the tensors."""

    evidence: str = ""
    quick_gelu: bool | None = None
    image_size: tuple[int, int] | None = None
    config: ModelConfig | None = None
    heads: tuple[int, int] | None = None  # of the image tower and of the text tower

    def contradictions(self, config: ModelConfig) -> list[str]:
        """Settings of `config` under which these weights would load and compute something else."""
        found = []
        if self.quick_gelu is not None and self.quick_gelu != config.quick_gelu and _has_native_tower(config):
            found.append(_quick_gelu_advice(config, self.quick_gelu))
        if self.heads is not None and self.heads != _heads(config, self.heads):
            found.append(f"they have {self.heads} heads (image, text), the model {_heads(config, self.heads)}")
        if self.config is not None:
            found += _different("vision_cfg", self.config.vision_cfg, config.vision_cfg, _vision_keys(config))
            found += _different("text_cfg", self.config.text_cfg, config.text_cfg, _text_keys(config))
        return found


def find_origin(raw: Mapping[str, Tensor], read: Callable[[str], str | None]) -> Origin:
    """The origin of the tensors `raw`. `read` gives the text of a file beside them, None if there is none.

    What cannot be understood is no evidence: the weights themselves are compared in any case.
    """
    if all(key in raw for key in OPENAI_TENSORS):
        side = int(raw["input_resolution"])
        return Origin(f"OpenAI's {OPENAI_TENSORS[0]}", quick_gelu=True, image_size=(side, side))
    for name in CONFIG_FILES:
        text = read(name)
        origin = None if text is None else _from_text(name, text)
        if origin is not None:
            return origin
    return Origin()


def _from_text(name: str, text: str) -> Origin | None:
    try:
        settings = json.loads(text)
        return _from_transformers(settings) if name == "config.json" else _from_schema(name, settings)
    except (ValueError, TypeError, AttributeError, KeyError):
        return None


def _from_schema(name: str, settings: Mapping[str, Any]) -> Origin:
    try:
        config = ModelConfig.from_dict(settings)
    except ConfigError:
        inner = settings.get("model_cfg", settings)
        return Origin(name, bool(inner.get("quick_gelu", False)), pair(inner["vision_cfg"]["image_size"]))
    return Origin(name, config.quick_gelu, pair(config.vision_cfg.image_size), config)


def _from_transformers(settings: Mapping[str, Any]) -> Origin | None:
    """transformers leaves out what equals its defaults; CLIP's activation is QuickGELU by default."""
    if settings.get("model_type") not in ("clip", "siglip"):
        return None
    is_clip = settings["model_type"] == "clip"
    vision = settings.get("vision_config") or {}
    activation = vision.get("hidden_act", "quick_gelu" if is_clip else "gelu_pytorch_tanh")
    text = settings.get("text_config") or {}
    heads = (vision.get("num_attention_heads", 12), text.get("num_attention_heads", 8 if is_clip else 12))
    return Origin("config.json", activation == "quick_gelu", pair(vision.get("image_size", 224)), heads=heads)


def _heads(config: ModelConfig, unknown: tuple[int, int]) -> tuple[int, int]:
    """Heads of both towers; where a tower is another library's, whose configuration does not say, `unknown`."""
    vision, text = config.vision_cfg, config.text_cfg
    has_own_heads = bool(vision.timm_model_name) or not isinstance(vision.layers, int)
    image_heads = unknown[0] if has_own_heads else vision.width // vision.head_width
    return image_heads, unknown[1] if text.hf_model_name else text.heads


def _has_native_tower(config: ModelConfig) -> bool:
    vision, text = config.vision_cfg, config.text_cfg
    is_native_vit = not vision.timm_model_name and isinstance(vision.layers, int)
    return is_native_vit or not text.hf_model_name


def _quick_gelu_advice(config: ModelConfig, expected: bool) -> str:
    name = config.name or "the model"
    if expected:
        return f"they were trained with QuickGELU and {name} has none: give --force-quick-gelu, or {name}-quickgelu"
    return f"they were trained without QuickGELU and {name} has it: give {name.removesuffix('-quickgelu')}"


def _different(path: str, theirs: object, ours: object, keys: tuple[str, ...]) -> list[str]:
    pairs = ((key, _effective(theirs, key), _effective(ours, key)) for key in keys)
    return [f"they were trained with {path}.{key} {old}, the model has {new}" for key, old, new in pairs if old != new]


def _effective(section: object, key: str) -> object:
    value = getattr(section, key)
    return _DEFAULTS.get(key) if value is None else value


def _vision_keys(config: ModelConfig) -> tuple[str, ...]:
    """The settings that the image tower reads: a timm trunk has its own, and a ResNet few."""
    names = [field.name for field in dataclasses.fields(VisionConfig) if field.name not in _FREE]
    if config.vision_cfg.timm_model_name:
        return tuple(name for name in names if name.startswith("timm_"))
    if not isinstance(config.vision_cfg.layers, int):
        return ("layers", "width", "head_width")
    return tuple(name for name in names if not name.startswith(("timm_", "attn_pooler_")))


def _text_keys(config: ModelConfig) -> tuple[str, ...]:
    names = [field.name for field in dataclasses.fields(TextConfig) if field.name not in _FREE_TEXT]
    if config.text_cfg.hf_model_name:
        return tuple(name for name in names if name.startswith("hf_"))
    return tuple(name for name in names if not name.startswith(("hf_", "tokenizer_")))
