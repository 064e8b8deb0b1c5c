"""The groups of a tower's layers: every parameter once, from input to output."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from models import build_model, list_models, load_model_config
from models.layer_groups import image_groups, text_groups

# One of each tower.
NAMES = (
    "ViT-B-32", "ViT-L-14-CLIPA", "RN50", "convnext_base", "ViT-B-16-SigLIP", "EVA02-B-16", "ViTamin-S",
    "MobileCLIP-S1", "PE-Core-T-16-384", "swin_base_patch4_window7_224", "vit_relpos_medium_patch16_cls_224",
    "tiny-test-timm",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_both_towers_is_in_one_group(name: str) -> None:
    assert name in list_models()
    with torch.device("meta"):
        model = build_model(load_model_config(name))
    found = Counter(key for groups in (image_groups(model), text_groups(model)) for group in groups for key in group)
    names = {key for key, _ in model.named_parameters()} - {"logit_scale", "logit_bias"}
    assert found == Counter(names)


def test_a_vision_transformer_begins_with_its_patches_and_ends_with_its_projection() -> None:
    with torch.device("meta"):
        groups = image_groups(build_model(load_model_config("ViT-B-32")))
    assert groups[0] == [
        "visual.class_embedding", "visual.positional_embedding", "visual.conv1.weight", "visual.ln_pre.weight",
        "visual.ln_pre.bias",
    ]  # fmt: skip
    assert all(key.startswith("visual.transformer.resblocks.3.") for key in groups[4])
    assert {"visual.ln_post.weight", "visual.transformer.resblocks.11.ln_1.weight"} <= set(groups[-2])
    assert groups[-1] == ["visual.proj"]
    assert len(groups) == 14


def test_a_text_tower_has_a_group_for_each_block() -> None:
    with torch.device("meta"):
        groups = text_groups(build_model(load_model_config("ViT-B-16-SigLIP")))
    assert groups[0] == ["text.positional_embedding", "text.token_embedding.weight"]
    assert groups[-1] == ["text.text_projection.weight", "text.text_projection.bias"]
    assert len(groups) == 14
