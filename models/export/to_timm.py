"""timm's form of the image tower: a model whose classifier is the projection. Reads with timm.

A native vision transformer becomes timm's, by timm's own conversion of OpenCLIP's names; a timm trunk becomes itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from models.clip import CLIP
from models.config import ModelConfig, VisionConfig, pair
from models.export.target import Encoders
from models.timm_tower import TimmTower
from models.vision import VisionTransformer

# An architecture of timm's with CLIP's norms; every size is told in arguments.
_NATIVE = "vit_base_patch32_clip_224"
_CROP_MODES = {"shortest": "center", "squash": "squash"}


@dataclass(frozen=True)
class Timm:
    """Holds image towers that end in one pooled feature and a linear projection, or an MLP as ConvNeXt has it."""

    name: str = "timm"
    tolerance: float = 1e-5

    def refusal(self, config: ModelConfig) -> str | None:
        vision = config.vision_cfg
        if config.preprocess.resize_mode not in _CROP_MODES:
            return "timm's transforms do not fit the longest side (preprocess_cfg.resize_mode longest)"
        if vision.timm_model_name:
            return _trunk_refusal(vision)
        if isinstance(vision.layers, tuple):
            return "timm has no ModifiedResNet with attention pooling under these names"
        return _native_refusal(vision)

    def write(self, model: CLIP, folder: Path) -> None:
        visual = model.visual
        exported, arguments = _of_trunk(model) if isinstance(visual, TimmTower) else _of_native(model)
        preprocess = model.config.preprocess
        size = pair(preprocess.size)
        save_for_hf(
            exported,
            str(folder),
            model_config={"num_classes": exported.num_classes},
            model_args=arguments,
            safe_serialization=True,
            data_config={
                "input_size": (3, *size),
                "mean": preprocess.mean,
                "std": preprocess.std,
                "interpolation": preprocess.interpolation,
                "crop_pct": 1.0,
                "crop_mode": _CROP_MODES[preprocess.resize_mode],
            },
        )

    def read(self, folder: Path, model: CLIP) -> Encoders:
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        transform = create_transform(**resolve_data_config(model=theirs), is_training=False)

        def image(pixels: Tensor) -> Tensor:
            return F.normalize(theirs(pixels), dim=-1)

        def prepare(picture: Image.Image) -> Tensor:
            return transform(picture)[None]

        return Encoders(image=image, prepare=prepare)


def _trunk_refusal(vision: VisionConfig) -> str | None:
    if vision.timm_pool in ("abs_attn", "rot_attn"):
        return f"timm_pool {vision.timm_pool} stands outside of timm's trunk"
    if vision.timm_proj == "mlp" and not (vision.timm_model_name or "").startswith("convnext"):
        return f"an MLP as projection, which timm's {vision.timm_model_name} has no place for"
    return None


def _native_refusal(vision: VisionConfig) -> str | None:
    plain = VisionConfig()
    for key in ("no_ln_pre", "pool_type", "final_ln_after_pool", "attentional_pool", "norm_kwargs", "act_kwargs"):
        if getattr(vision, key) != getattr(plain, key):
            return f"vision_cfg.{key} {getattr(vision, key)!r} is not among the arguments of timm's vision transformer"
    return None


def _of_native(model: CLIP) -> tuple[Any, dict[str, Any]]:
    """timm's model with the weights of a native tower, and what it was made with."""
    config, visual = model.config, model.visual
    assert isinstance(visual, VisionTransformer)
    vision = config.vision_cfg
    arguments: dict[str, Any] = {
        "img_size": list(visual.image_size),
        "patch_size": list(visual.patch_size),
        "embed_dim": vision.width,
        "depth": vision.layers,
        "num_heads": vision.width // vision.head_width,
        "mlp_ratio": vision.mlp_ratio,
        "init_values": vision.ls_init_value,
        "act_layer": "quick_gelu" if config.quick_gelu else "gelu",
    }
    exported: Any = timm.create_model(_NATIVE, num_classes=config.embed_dim, **arguments)
    state = {f"visual.{key}": value for key, value in visual.state_dict().items()}
    exported.load_state_dict(checkpoint_filter_fn(state, exported), strict=True)
    return exported, arguments


def _of_trunk(model: CLIP) -> tuple[Any, dict[str, Any]]:
    """The trunk with the projection as its classifier, and what it was made with."""
    config, visual = model.config, model.visual
    assert isinstance(visual, TimmTower)
    vision = config.vision_cfg
    arguments: dict[str, Any] = {}
    if visual.trunk.default_cfg.get("fixed_input_size"):
        arguments["img_size"] = list(pair(vision.image_size))
    if vision.timm_pool:
        arguments["global_pool"] = vision.timm_pool
    if vision.timm_proj == "mlp":
        arguments["head_hidden_size"] = 2 * config.embed_dim
    num_classes = 0 if vision.timm_proj == "none" else config.embed_dim
    exported: Any = timm.create_model(str(vision.timm_model_name), num_classes=num_classes, **arguments)
    exported.load_state_dict(visual.trunk.state_dict() | _projection(exported, visual), strict=True)
    return exported, arguments


def _projection(exported: Any, visual: TimmTower) -> dict[str, Tensor]:
    """The head's weights under the names of the exported model's classifier, whose bias adds nothing."""
    head: Any = visual.head
    if not list(head.parameters()):
        return {}
    classifier = next(name for name, module in exported.named_modules() if module is exported.get_classifier())
    last = head.proj if hasattr(head, "proj") else head.mlp.fc2
    bias = last.bias if last.bias is not None else torch.zeros(len(last.weight))
    weights = {f"{classifier}.weight": last.weight, f"{classifier}.bias": bias}
    if hasattr(head, "mlp"):
        hidden = f"{classifier.rpartition('.')[0]}.pre_logits.fc"
        weights |= {f"{hidden}.weight": head.mlp.fc1.weight, f"{hidden}.bias": head.mlp.fc1.bias}
    return weights


TARGET = Timm()
