"""Costs counted from shapes agree with the published tables, whatever the tower."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models import CLIP, TextPlan, build_model, config_with, list_models, load_model_config
from models.profile import DECODER, IMAGE, TEXT, Cost, count_parameters, profile_model

# Of OpenCLIP's model profile: millions of parameters (all, image tower), and forward GFLOPs, which are twice the
# GMACs, of the image tower and of the text tower at its full context. Names that are no model here yet wait for it.
PUBLISHED = {
    "ViT-B-32": (151.28, 87.85, 8.82, 5.96),
    "ViT-B-16": (149.62, 86.19, 35.13, 5.96),
    "ViT-L-14": (427.62, 303.97, 162.03, 13.3),
    "ViT-L-14-336": (427.94, 304.29, 381.92, 13.3),
    "ViT-H-14": (986.11, 632.08, 334.59, 47.09),
    "ViT-g-14": (1366.68, 1012.65, 534.06, 47.09),
    "ViT-bigG-14": (2539.57, 1844.91, 967.5, 97.86),
    "ViT-L-14-CLIPA": (414.21, 303.96, 162.03, 5.47),
    "convnext_base_w_320": (179.39, 88.22, 62.67, 9.27),
    "convnext_large_d": (351.77, 199.77, 89.76, 17.73),
    "convnext_large_d_320": (351.77, 199.77, 140.25, 17.73),
    "convnext_xxlarge": (1200.58, 846.54, 395.94, 47.09),
    "swin_base_patch4_window7_224": (178.56, 87.4, 30.86, 9.27),
    "ViT-B-16-SigLIP": (203.16, 92.88, 35.42, 11.02),
    "ViT-SO400M-14-SigLIP-384": (877.96, 428.23, 670.35, 53.13),
    "EVA02-L-14-336": (428.08, 304.43, 381.86, 13.3),
    "coca_ViT-L-14": (638.45, 306.72, 163.64, 13.3),
}
# Millions of activations of image towers and text towers, from timm's tables and the comparisons on model cards.
ACTIVATIONS = {
    "ViT-B-32": (5.01, 5.30),
    "ViT-L-14": (88.79, 7.95),
    "ViT-L-14-336": (270.24, 7.95),
    "ViT-H-14": (139.41, 21.20),
    "convnext_large_d": (56.33, 10.60),
    "convnext_large_d_320": (88.02, 10.60),
}


def _towers(name: str, **changes: int) -> dict[str, Cost]:
    return {cost.tower: cost for cost in profile_model(config_with(load_model_config(name), **changes)).towers}


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name in list_models()])
def test_parameters_and_macs_are_the_published_ones(name: str) -> None:
    profile = profile_model(load_model_config(name))
    found = (
        profile.total.parameters,
        profile.towers[0].parameters,
        2 * profile.towers[0].macs,
        2 * profile.towers[1].macs,
    )
    assert [f"{value:.2f}" for value in (found[0] / 1e6, found[1] / 1e6)] == [f"{v:.2f}" for v in PUBLISHED[name][:2]]
    assert [value / 1e9 for value in found[2:]] == pytest.approx(PUBLISHED[name][2:], rel=1e-3)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_the_published_ones(name: str) -> None:
    towers = _towers(name)
    assert [towers[tower].activations / 1e6 for tower in (IMAGE, TEXT)] == pytest.approx(ACTIVATIONS[name], rel=1e-3)


def test_the_published_comparison_of_a_large_vit_with_a_convnext_holds() -> None:
    """LAION's card of convnext_large_d_320: ViT-L/14 at 336 px has 2.5x GMAC, 2.8x activations, 1.22x parameters."""
    vit, convnext = (profile_model(load_model_config(name)).total for name in ("ViT-L-14-336", "convnext_large_d_320"))
    assert round(vit.macs / convnext.macs, 1) == 2.5
    assert round(vit.activations / convnext.activations, 1) == 2.8
    assert round(vit.parameters / convnext.parameters, 2) == 1.22
    # Fused attention writes no maps, and most of the difference in activations was maps.
    fused = [cost.activations - cost.attention_maps for cost in (vit, convnext)]
    assert fused[0] / fused[1] == pytest.approx(1.53, abs=0.01)


@pytest.mark.parametrize(
    ("name", "published", "cells", "width", "embed"),
    [("RN50", 12.22, 49, 2048, 1024), ("RN50x16", 149.39, 144, 3072, 768)],
)
def test_an_attention_pool_costs_less_than_published_because_only_its_first_query_is_computed(
    name: str, published: float, cells: int, width: int, embed: int
) -> None:
    """OpenCLIP pools with as many queries as there are positions, and then takes the first."""
    spared = cells * (width * width + 2 * (cells + 1) * width + width * embed)
    assert 2 * (_towers(name)[IMAGE].macs + spared) / 1e9 == pytest.approx(published, rel=1e-3)


def test_a_decoder_costs_as_published_but_for_the_token_that_has_no_next() -> None:
    """OpenCLIP decodes all 76 tokens of CoCa's texts for 37.58 GFLOPs, image tokens (256 of 768) included."""
    tower = _towers("coca_ViT-L-14")[DECODER]
    one_token = 12 * ((4 + 8) * 768**2 + (2 + 8) * 768**2 + 2 * 256 * 768) + 768 * 49408
    attention = 12 * 2 * 768 * (76**2 - 75**2)
    assert tower.parameters / 1e6 == pytest.approx(208.07, abs=0.01)
    assert 2 * (tower.macs + one_token + attention) / 1e9 == pytest.approx(37.58, rel=1e-3)


def test_a_vit_costs_what_its_formula_says_at_any_resolution_and_context() -> None:
    vision, text = load_model_config("tiny-test").vision_cfg, load_model_config("tiny-test").text_cfg
    towers = _towers("tiny-test", image_size=48, context_length=9)
    cells, width = (48 // 8) ** 2, vision.width
    embed = load_model_config("tiny-test").embed_dim

    def blocks(tokens: int, width: int, layers: int, mlp_ratio: float) -> int:
        return int(layers * ((4 + 2 * mlp_ratio) * tokens * width**2 + 2 * tokens**2 * width))

    assert isinstance(vision.layers, int)
    image_macs = cells * 3 * 8 * 8 * width + blocks(cells + 1, width, vision.layers, vision.mlp_ratio) + width * embed
    text_macs = blocks(9, text.width, text.layers, text.mlp_ratio) + text.width * embed
    assert (towers[IMAGE].macs, towers[TEXT].macs) == (image_macs, text_macs)
    assert towers[TEXT].attention_maps == text.layers * text.heads * 9 * 9


class _Asking(CLIP):
    """A model that asks for a value where there are only shapes, as the text encoders of transformers do."""

    def encode_text(self, tokens: Tensor, normalize: bool = False, plan: TextPlan | None = None) -> Tensor:
        assert (tokens != 1).all()
        return super().encode_text(tokens, normalize, plan)


def test_a_tower_that_asks_whether_there_is_padding_hears_no(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_model_config("tiny-test")
    expected = profile_model(config)
    monkeypatch.setattr("models.profile.build_model", _Asking)
    assert profile_model(config) == expected


def test_a_batch_costs_as_much_as_its_samples() -> None:
    config = load_model_config("tiny-test-timm")
    one, three = profile_model(config).total, profile_model(config, batch_size=3).total
    assert (three.macs, three.activations) == (3 * one.macs, 3 * one.activations)
    assert three.parameters == one.parameters


def test_the_towers_and_the_temperature_are_all_parameters() -> None:
    with torch.device("meta"):
        model = build_model(load_model_config("tiny-test-rn"))
    numbers = count_parameters(model)
    assert numbers.total() == sum(parameter.numel() for parameter in model.parameters())
    assert numbers[IMAGE] == sum(parameter.numel() for parameter in model.visual.parameters())
    assert (numbers["logit_scale"], numbers[DECODER]) == (1, 0)
