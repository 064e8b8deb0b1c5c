"""How weights differ from a model, and which registered models they would fit instead. Builds models without memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.clip import CLIP
from models.config import ModelConfig, PreprocessConfig, TextConfig, VisionConfig, pair
from models.errors import ConfigError
from models.positions import position_keys
from models.registry import list_models, load_model_config

State = Mapping[str, Tensor]
Adapt = Callable[[CLIP, dict[str, Tensor]], dict[str, Tensor]]
_NUM_SHOWN = 5
# Where the families of timm's trunks keep their first block, by the beginning of a name.
_FIRST_BLOCKS = {
    "vitamin": "patch_embed.backbone.",
    "fastvit": "stem.0.",
    "convnext": "stages.0.blocks.0.conv_dw.",
    "swin": "layers.0.blocks.0.",
    "eva": "blocks.0.",
    "vit": "blocks.0.",
}


@dataclass(frozen=True)
class Difference:
    """How a state dict differs from a model: keys, and (key, shape in the file, shape in the model)."""

    missing: list[str]
    unexpected: list[str]
    shapes: list[tuple[str, list[int], list[int]]]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def __str__(self) -> str:
        shapes = [f"{key} {old} in the file, {new} in the model" for key, old, new in self.shapes]
        parts = [("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", shapes)]
        return "; ".join(f"{len(items)} {what}: {first(items)}" for what, items in parts if items)


def compare(model: CLIP, state: State, ignored: tuple[str, ...] = ()) -> Difference:
    """The differences, apart from the shapes of `ignored` keys."""
    own = {key: list(value.shape) for key, value in model.state_dict().items()}
    shapes = [
        (key, list(state[key].shape), shape)
        for key, shape in own.items()
        if key in state and list(state[key].shape) != shape and key not in ignored
    ]
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    return Difference(missing, unexpected, shapes)


def models_that_fit(raw: dict[str, Tensor], adapt: Adapt, quick_gelu: bool | None = None) -> list[str]:
    """Names of registered models that these weights belong to, up to image size and context length.

    adapt: renames the weights for a model, in place of nothing. quick_gelu: what is known of their activation.
    """
    verdicts: dict[ModelConfig, bool] = {}
    fitting = []
    for name in list_models():
        config = load_model_config(name)
        if (quick_gelu is not None and config.quick_gelu != quick_gelu) or not _may_fit(config, raw):
            continue
        shape = _without_sizes(config)
        if shape not in verdicts:
            verdicts[shape] = _fits(config, raw, adapt)
        if verdicts[shape]:
            fitting.append(name)
    return fitting


def first(items: list[str]) -> str:
    """The first few, and whether there are more."""
    return ", ".join(items[:_NUM_SHOWN]) + (", ..." if len(items) > _NUM_SHOWN else "")


def _without_sizes(config: ModelConfig) -> ModelConfig:
    """What decides the shapes of the weights: models that differ in nothing else are built once."""
    return replace(
        config,
        name="",
        quick_gelu=False,
        vision_cfg=replace(config.vision_cfg, image_size=224),
        text_cfg=replace(config.text_cfg, context_length=77, tokenizer_kwargs=None),
        preprocess=PreprocessConfig(size=224),
    )


def _fits(config: ModelConfig, raw: dict[str, Tensor], adapt: Adapt) -> bool:
    # Imported here because the factory imports what loads weights.
    from models.factory import build_model

    try:
        with torch.device("meta"):
            model = build_model(config)
    except ConfigError:
        return False
    return not compare(model, adapt(model, raw), ignored=tuple(position_keys(model)))


def _may_fit(config: ModelConfig, raw: State) -> bool:
    """What a few keys and shapes say, which is cheaper than building towers."""
    has_decoder = any(key.startswith("text_decoder.") for key in raw)
    return (
        has_decoder == (config.multimodal_cfg is not None)
        and _projection_may_fit(config, raw)
        and _text_may_fit(config.text_cfg, raw)
        and _vision_may_fit(config.vision_cfg, raw)
    )


def _projection_may_fit(config: ModelConfig, raw: State) -> bool:
    for key in ("text_projection", "text.text_projection"):
        if key in raw and not config.text_cfg.hf_model_name:
            return tuple(raw[key].shape) == (config.text_cfg.width, config.embed_dim)
    return True


def _text_may_fit(text: TextConfig, raw: State) -> bool:
    table = raw.get("token_embedding.weight", raw.get("text.token_embedding.weight"))
    if text.hf_model_name or table is None:
        return bool(text.hf_model_name) and table is None and any(key.startswith("text.transformer.") for key in raw)
    if tuple(table.shape) != (text.vocab_size, text.width):
        return False
    root = "" if "token_embedding.weight" in raw else "text."
    return _has_depth(raw, f"{root}transformer.resblocks.{{}}.ln_1.weight", text.layers)


def _vision_may_fit(vision: VisionConfig, raw: State) -> bool:
    if vision.timm_model_name:
        family = next((name for name in _FIRST_BLOCKS if vision.timm_model_name.startswith(name)), None)
        block = f"visual.trunk.{_FIRST_BLOCKS.get(family or '', '')}"
        return any(key.startswith(block) for key in raw)
    stem = raw.get("visual.conv1.weight")
    if stem is None:
        return False
    if not isinstance(vision.layers, int):
        return len(stem) == vision.width // 2 and _has_depth(raw, "visual.layer3.{}.bn1.weight", vision.layers[2])
    is_patch = tuple(stem.shape) == (vision.width, 3, *pair(vision.patch_size or 1))
    return is_patch and _has_depth(raw, "visual.transformer.resblocks.{}.ln_1.weight", vision.layers)


def _has_depth(raw: State, key: str, layers: int) -> bool:
    return key.format(layers - 1) in raw and key.format(layers) not in raw
