"""What transformers saves is read as it is, and computes what it computed there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import CLIP, CheckpointError, ModelConfig, build_model, load_pretrained
from models.from_transformers import from_transformers

transformers = pytest.importorskip("transformers", reason="compares with transformers")

# Sizes of the towers, in transformers' words. SigLIP's pooling has heads of its own: those of timm's trunk.
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 8,
    "bos_token_id": 62,
    "eos_token_id": 63,
}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_NATIVE: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2},
}


def _randomised(model: Any) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (0.5 if parameter.ndim == 1 else 0.0))
    return model.eval()


def _clip(activation: str = "gelu") -> Any:
    text, vision = {**_TEXT, "hidden_act": activation}, {**_VISION, "hidden_act": activation}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    return _randomised(transformers.CLIPModel(config))


def _inputs(size: int = 32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    tokens = torch.randint(1, 62, (3, 8))
    tokens[:, -1] = 63
    return torch.randn(3, 3, size, size), tokens


def _assert_equal_features(ours: CLIP, theirs: Any, size: int = 32) -> None:
    image, tokens = _inputs(size)
    with torch.no_grad():
        output = theirs(input_ids=tokens, pixel_values=image)
        mine = ours.eval()(image, tokens)
    for feature, other in zip(mine[:2], (output.image_embeds, output.text_embeds), strict=True):
        torch.testing.assert_close(feature, F.normalize(other, dim=-1), rtol=0, atol=1e-5)
    logits = mine[2] * mine[0] @ mine[1].T + (mine[3] if len(mine) > 3 else 0)
    torch.testing.assert_close(logits, output.logits_per_image, rtol=1e-4, atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_a_clip_model_of_transformers_has_the_same_features_here(tmp_path: Path, activation: str) -> None:
    theirs = _clip(activation)
    theirs.save_pretrained(tmp_path)
    ours = build_model(ModelConfig.from_dict({**_NATIVE, "quick_gelu": activation == "quick_gelu"}))
    report = load_pretrained(ours, str(tmp_path))
    assert report.converted == ("names of transformers' CLIPModel",)
    _assert_equal_features(ours, theirs)


@pytest.mark.parity
@pytest.mark.slow
def test_a_siglip_model_of_transformers_has_the_same_features_here(tmp_path: Path) -> None:
    theirs = _siglip()
    theirs.save_pretrained(tmp_path)
    ours = build_model(_siglip_config())
    report = load_pretrained(ours, str(tmp_path))
    assert report.converted == ("names of transformers' SiglipModel",)
    _assert_equal_features(ours, theirs, size=64)


def _siglip() -> Any:
    """The image tower is of full size: timm has no smaller one of SigLIP's form."""
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    # timm's trunk of this name has the exact GELU, which OpenCLIP's models of it therefore have; transformers' default
    # is the approximation by tanh.
    vision = {**_VISION, **sizes, "image_size": 64, "patch_size": 16, "hidden_act": "gelu"}
    model = transformers.SiglipModel(
        transformers.SiglipConfig(text_config={**_TEXT, "projection_size": 768}, vision_config=vision)
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05 + (0.5 if parameter.ndim == 1 else 0.0))
    return model.eval()


def _siglip_config() -> ModelConfig:
    """As OpenCLIP's SigLIP configurations."""
    text = {**_NATIVE["text_cfg"], "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    text |= {"norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}}
    vision = {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none"}
    vision |= {"image_size": 64}
    raw = {"embed_dim": 768, "custom_text": True, "init_logit_bias": -10, "vision_cfg": vision, "text_cfg": text}
    return ModelConfig.from_dict(raw)


@pytest.mark.parity
def test_a_model_in_several_files_is_read_whole(tmp_path: Path) -> None:
    theirs = _clip()
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = build_model(ModelConfig.from_dict(_NATIVE))
    load_pretrained(ours, str(tmp_path))
    _assert_equal_features(ours, theirs)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002\S+ is missing, model\.safetensors\.index\.json names it"):
        load_pretrained(ours, str(tmp_path))


@pytest.mark.parity
def test_transformers_default_activation_is_known_to_be_quick_gelu(tmp_path: Path) -> None:
    _clip("quick_gelu").save_pretrained(tmp_path)
    ours = build_model(ModelConfig.from_dict(_NATIVE, name="ViT-X"))
    with pytest.raises(CheckpointError, match=r"trained with QuickGELU.*--force-quick-gelu, or ViT-X-quickgelu"):
        load_pretrained(ours, str(tmp_path))


@pytest.mark.parity
@pytest.mark.parametrize("section", ["vision_cfg", "text_cfg"])
def test_another_number_of_heads_than_transformers_is_refused(tmp_path: Path, section: str) -> None:
    _clip().save_pretrained(tmp_path)
    heads = {"vision_cfg": {"head_width": 16}, "text_cfg": {"heads": 4}}[section]
    ours = build_model(ModelConfig.from_dict({**_NATIVE, section: {**_NATIVE[section], **heads}}))
    with pytest.raises(CheckpointError, match=r"they have \(2, 2\) heads \(image, text\), the model \((4, 2|2, 4)\)"):
        load_pretrained(ours, str(tmp_path))


def test_position_numbers_of_old_releases_are_left_out_and_other_weights_stay_as_they_are() -> None:
    state = {
        "vision_model.embeddings.class_embedding": torch.zeros(4),
        "vision_model.embeddings.position_ids": torch.arange(5),
    }
    assert from_transformers(state)[0].keys() == {"visual.class_embedding"}
    native = {"visual.class_embedding": torch.zeros(4)}
    assert from_transformers(native) == (native, [])
