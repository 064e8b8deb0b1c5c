"""Every family equals OpenCLIP's: the same keys, shapes, features, resized positions and initial spread."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import CLIP, ModelConfig, build_model, config_with, load_model_config, load_pretrained
from models.export.to_openclip import schema
from tests.models.conftest import FAMILIES

pytestmark = pytest.mark.parity
open_clip = pytest.importorskip("open_clip", reason="compares with open_clip_torch")

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "vit": {"vision_cfg": VIT},
    "vit_quickgelu": {"vision_cfg": VIT, "quick_gelu": True},
    "vit_layer_scale": {
        "vision_cfg": {**VIT, "ls_init_value": 0.1, "mlp_ratio": 4.3637},
        "text_cfg": {**TEXT, "ls_init_value": 0.1},
    },
    "vit_average_pool": {"vision_cfg": {**VIT, "pool_type": "avg", "no_ln_pre": True}},
    "vit_norm_after_pool": {"vision_cfg": {**VIT, "pool_type": "avg", "final_ln_after_pool": True}},
    "vit_tanh_and_eps": {
        "vision_cfg": {**VIT, "act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}},
        "text_cfg": {**TEXT, "norm_kwargs": {"eps": 1e-6}},
    },
    "vit_bias": {"vision_cfg": VIT, "init_logit_bias": -10},
    "resnet": {"vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "patch_size": None}},
    "timm_mlp": {
        "vision_cfg": {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "mlp"}
    },
    "timm_linear": {
        "vision_cfg": {
            "image_size": 64,
            "timm_model_name": "test_convnext",
            "timm_pool": "",
            "timm_proj": "linear",
            "timm_drop_path": 0.1,
        }
    },
    "timm_head": {"vision_cfg": {"image_size": 64, "timm_model_name": "test_convnext", "timm_proj": ""}},
    "timm_vit": {"vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token"}},
    "timm_attention_pool": {
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_convnext", "timm_pool": "abs_attn", "timm_proj": ""}
    },
    "custom_text": {"vision_cfg": VIT, "custom_text": True},
    "siglip_text": {
        "vision_cfg": VIT,
        "custom_text": True,
        "init_logit_bias": -10,
        "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    },
    "eos_pool": {"vision_cfg": VIT, "custom_text": True, "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 49407}},
    "no_text_projection": {
        "vision_cfg": VIT,
        "custom_text": True,
        "text_cfg": {**TEXT, "width": 32, "proj_type": "none"},
    },
}


def _pair(raw: dict[str, Any], folder: Path, **force: Any) -> tuple[CLIP, nn.Module]:
    """Our model and OpenCLIP's from one schema, with equal weights other than the initial ones."""
    raw = {"embed_dim": 32, "text_cfg": TEXT, **raw}
    path = folder / f"parity-{folder.name}.json"
    path.write_text(json.dumps(raw))
    open_clip.add_model_config(path)
    theirs = open_clip.create_model(path.stem, force_image_size=force.get("image_size"))
    torch.manual_seed(7)
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim:
                tensor.add_(torch.randn_like(tensor).abs(), alpha=0.02)
    ours = build_model(config_with(ModelConfig.from_dict(raw), **force))
    return ours.eval(), theirs.eval()


def _inputs(config: ModelConfig) -> tuple[Tensor, Tensor]:
    torch.manual_seed(11)
    size = config.vision_cfg.image_size
    tokens = torch.randint(1, 40000, (4, 16))
    for row, end in enumerate((3, 7, 12, 15)):
        tokens[row, end] = 49407
        tokens[row, end + 1 :] = 0
    return torch.randn(4, 3, size, size), tokens


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_go_both_ways_and_features_are_equal(kind: str, tmp_path: Path) -> None:
    ours, theirs = _pair(CONFIGS[kind], tmp_path)
    assert _shapes(ours) == _shapes(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    image, tokens = _inputs(ours.config)
    with torch.no_grad():
        for normalize in (False, True):
            _assert_close(ours.encode_image(image, normalize), theirs.encode_image(image, normalize))
            _assert_close(ours.encode_text(tokens, normalize), theirs.encode_text(tokens, normalize))
        for mine, other in zip(ours(image, tokens), theirs(image, tokens), strict=True):
            _assert_close(mine, other)


@pytest.mark.parametrize("kind", ["vit", "resnet", "timm_mlp"])
def test_gradients_are_equal(kind: str, tmp_path: Path) -> None:
    ours, theirs = _pair(CONFIGS[kind], tmp_path)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    inputs = _inputs(ours.config)
    gradients = []
    for model in (ours, theirs):
        image_features, text_features, scale = model(*inputs)
        (scale * image_features @ text_features.T).logsumexp(1).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(
            gradients[0][name], gradient, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("kind", "size"), [("vit", 64), ("vit", 24), ("timm_vit", 96), ("timm_mlp", 96)])
def test_resized_models_give_openclips_features(kind: str, size: int, tmp_path: Path) -> None:
    small, theirs_small = _pair(CONFIGS[kind], tmp_path)
    small.load_state_dict(theirs_small.state_dict())
    path = tmp_path / "small.pt"
    torch.save({"epoch": 1, "name": "x", "state_dict": theirs_small.state_dict()}, path)
    theirs = open_clip.create_model(f"parity-{tmp_path.name}", pretrained=str(path), force_image_size=size).eval()
    ours = build_model(config_with(small.config, image_size=size)).eval()
    load_pretrained(ours, str(path))
    image, _ = _inputs(ours.config)
    with torch.no_grad():
        _assert_close(ours.encode_image(image), theirs.encode_image(image))


def test_a_longer_context_gives_openclips_features(tmp_path: Path) -> None:
    _, theirs_small = _pair(CONFIGS["vit"], tmp_path)
    path = tmp_path / "small.pt"
    torch.save(theirs_small.state_dict(), path)
    theirs = open_clip.create_model(f"parity-{tmp_path.name}", pretrained=str(path), force_context_length=24).eval()
    ours = build_model(
        config_with(ModelConfig.from_dict({"embed_dim": 32, "vision_cfg": VIT, "text_cfg": TEXT}), context_length=24)
    )
    load_pretrained(ours, str(path))
    tokens = torch.randint(1, 40000, (3, 24))
    tokens[:, -1] = 49407
    with torch.no_grad():
        _assert_close(ours.encode_text(tokens), theirs.encode_text(tokens))


@pytest.mark.parametrize("name", [*FAMILIES, "tiny-test-coca"])
def test_initial_values_have_openclips_spread(name: str, tmp_path: Path) -> None:
    """Standard deviations of many values, exact equality of the constant ones."""
    path = tmp_path / f"spread-{name}.json"
    path.write_text(json.dumps(schema(load_model_config(name))["model_cfg"]))
    open_clip.add_model_config(path)
    theirs, ours = open_clip.create_model(path.stem).state_dict(), build_model(load_model_config(name)).state_dict()
    for key, other in theirs.items():
        # OpenCLIP leaves a decoder's output matrix as its memory happens to be.
        if not other.is_floating_point() or key == "text_decoder.text_projection":
            continue
        std, mine = other.float().std(correction=0).item(), ours[key].float().std(correction=0).item()
        if std == 0:
            assert torch.equal(ours[key], other), key
        else:
            # Six standard errors of the ratio of two estimated deviations.
            assert math.log(mine / std) == pytest.approx(0, abs=6 / math.sqrt(other.numel())), key


def _assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
