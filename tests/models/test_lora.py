"""Adapters: where they go, what they leave alone, and merged weights that compute the same under the plain names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import models
from models import CLIP, ConfigError, ModelConfig
from models.layers import Mlp
from models.lora import Lora, adapt, adapter_state, load_adapter_state, merged_weights

pytest.importorskip("peft", reason="the adapters are peft's")

Build = Callable[[str | ModelConfig], CLIP]
# fp32 features of length 1: a few dozen roundings on the way.
TOLERANCE = 2e-6


def timm_vit() -> ModelConfig:
    raw = models.load_model_config("tiny-test").to_dict()
    vision = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
    return ModelConfig.from_dict({key: raw[key] for key in ("embed_dim", "text_cfg")} | {"vision_cfg": vision})


MODELS: dict[str, Any] = {"native": "tiny-test", "convnext": "tiny-test-timm", "timm-vit": timm_vit()}


def inputs(model: CLIP) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 49405, (3, 16), generator=generator)
    tokens[:, 9] = 49407
    return torch.randn(3, 3, *model.visual.image_size, generator=generator), tokens


@torch.no_grad()
def features(model: CLIP) -> Tensor:
    """Of both towers, in evaluation mode."""
    image, text, *_ = model.eval()(*inputs(model))
    return torch.cat([image, text])


def trained(model: CLIP) -> CLIP:
    """As after training: no factor of an adapter is 0."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_fresh_adapters_change_nothing(build: Build, name: str) -> None:
    plain, model = build(MODELS[name]), build(MODELS[name])
    adapt(model, Lora(2, 3))
    assert torch.equal(features(model), features(plain))


@pytest.mark.parametrize("name", MODELS)
def test_merged_weights_compute_the_same_in_a_model_without_adapters(build: Build, name: str) -> None:
    plain, model = build(MODELS[name]), build(MODELS[name])
    before = features(plain)
    adapt(model, Lora(2, 3, alpha=5))
    adapted = features(trained(model))
    plain.load_state_dict(dict(merged_weights(model)))
    assert (features(plain) - adapted).abs().max() < TOLERANCE
    assert (before - adapted).abs().max() > 1e-3


def test_the_merged_weight_is_the_base_with_the_scaled_product_of_its_factors(build: Build) -> None:
    model, plain = build("tiny-test"), build("tiny-test").state_dict()
    adapt(model, Lora(2, 0, alpha=5))
    state, merged = trained(model).state_dict(), merged_weights(model)
    name = "visual.transformer.resblocks.0.attn.stacked_in_proj"
    product = state[f"{name}.lora_B.default.weight"] @ state[f"{name}.lora_A.default.weight"]
    key = "visual.transformer.resblocks.0.attn.in_proj_weight"
    torch.testing.assert_close(merged[key], plain[key] + 5 / 2 * product)


def test_by_default_all_linear_layers_of_both_towers_blocks_are_adapted_and_nothing_else_trains(build: Build) -> None:
    model = build("tiny-test")
    adapt(model, Lora(2, 2))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = ("attn.stacked_in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
    assert trainable == {"logit_scale"} | {
        f"{tower}transformer.resblocks.{block}.{layer}.lora_{factor}.default.weight"
        for tower in ("", "visual.")
        for block in range(2)
        for layer in layers
        for factor in "AB"
    }


def test_gradients_reach_each_adapter(build: Build) -> None:
    model = build("tiny-test")
    adapt(model, Lora(2, 2))
    image, text, scale = trained(model)(*inputs(model))
    (scale * image @ text.T).diagonal().sum().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_an_adapted_block_is_one_graph_for_the_compiler(build: Build, name: str) -> None:
    model = build(MODELS[name])
    adapt(model, Lora(2, 2))
    expected = features(trained(model))
    torch.compiler.reset()
    for block in model.blocks():
        block.forward = torch.compile(block.forward, dynamic=False, fullgraph=True, backend="eager")
    assert torch.equal(features(model), expected)


def test_targets_are_ends_of_names_as_the_tower_writes_them_and_projections_train_when_asked(build: Build) -> None:
    model = build("tiny-test")
    assert adapt(model, Lora(2, 0, targets=("in_proj", "1.mlp.*"), train_projections=True)) == [
        "image tower: rank 2 on 4 matrices"
    ]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and "lora_B" not in name}
    blocks = "visual.transformer.resblocks"
    assert trainable == {"logit_scale", "visual.proj", "text_projection"} | {
        f"{blocks}.{layer}.lora_A.default.weight"
        for layer in ("0.attn.stacked_in_proj", "1.attn.stacked_in_proj", "1.mlp.c_fc", "1.mlp.c_proj")
    }


def test_a_layer_whose_weight_is_read_without_a_call_gets_no_adapter_that_would_never_run(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Mlp, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(F.linear(x, self.c_fc.weight, self.c_fc.bias)))

    monkeypatch.setattr(Mlp, "forward", forward)
    model = build("tiny-test")
    adapt(model, Lora(2, 0))
    assert not [name for name, _ in model.named_parameters() if "c_fc.lora" in name]
    assert [name for name, _ in model.named_parameters() if "c_proj.lora" in name]


def test_statistics_of_frozen_batch_norms_stay(build: Build) -> None:
    model = build("tiny-test-rn")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    adapt(model, Lora(0, 2))
    model.train()(*inputs(model))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize(
    ("name", "lora", "reason"),
    [
        (
            "tiny-test-rn",
            Lora(2, 2),
            r"--lora-image-rank: .*-rn \(ModifiedResNet\) has no linear layer in its",
        ),
        (
            "tiny-test",
            Lora(2, 0, targets=("qkv",)),
            r"\(VisionTransformer\) has no linear layer that --lora-target",
        ),
        ("tiny-test", Lora(0, 2, targets=("qkv",)), "--lora-text-rank: the text tower of tiny-test"),
    ],
)
def test_a_tower_with_nothing_to_adapt_is_refused_by_name(build: Build, name: str, lora: Lora, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        adapt(build(name), lora)


def test_without_peft_the_extra_to_install_is_named(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'clipyard\[lora\]'"):
        adapt(build("tiny-test"), Lora(2, 2))


def test_adapters_and_what_they_adapt_come_back_and_another_rank_is_refused(build: Build) -> None:
    model, other, wrong = build("tiny-test"), build("tiny-test"), build("tiny-test")
    for each, rank in ((model, 2), (other, 2), (wrong, 4)):
        adapt(each, Lora(rank, 2))
    saved = {name: tensor.clone() for name, tensor in adapter_state(trained(model)).items()}
    other.load_state_dict({name: torch.zeros_like(saved[name]) for name in saved}, strict=False)
    load_adapter_state(other, saved)
    assert torch.equal(features(other), features(model))
    with pytest.raises(ConfigError, match=r"lora_A.default.weight: 2x64 in the checkpoint, 4x64 by --lora-rank"):
        load_adapter_state(wrong, saved)


@pytest.mark.parity
@pytest.mark.parametrize("name", MODELS)
def test_openclip_loads_merged_weights_and_computes_the_same(build: Build, name: str, tmp_path: Any) -> None:
    open_clip = pytest.importorskip("open_clip")
    model = build(MODELS[name])
    adapt(model, Lora(2, 2))
    ours = features(trained(model))
    raw = model.config.to_dict()
    theirs = open_clip.CLIP(raw["embed_dim"], raw["vision_cfg"], raw["text_cfg"])
    theirs.load_state_dict(dict(merged_weights(model)))
    image, text, _ = theirs.eval()(*inputs(model))
    assert (torch.cat([image, text]) - ours).abs().max() < 1e-5
