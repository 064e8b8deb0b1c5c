"""Which parameters decay, and with which constants."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import models
from training.config import OptimConfig
from training.optimizer import adamw_settings, build_optimizer, describe_optimizer, is_decayed

# Native towers of every size, and ConvNeXts.
CONFIGS = [name for name in models.list_models() if re.match(r"tiny|RN|convnext|ViT-\w+-\d\d$", name)]
# One of each other trunk.
OTHERS = (
    "ViT-B-16-SigLIP",
    "EVA02-B-16",
    "ViTamin-S",
    "MobileCLIP-S1",
    "MobileCLIP2-S0",
    "PE-Core-T-16-384",
    "swin_base_patch4_window7_224",
    "vit_relpos_medium_patch16_cls_224",
)
NO_MATRIX = re.compile(
    r"(\b|_)(norm\w*|bn\w*|ln_\w+|identity)\.weight|bias(_table)?$|gamma|pos_embed|positional|_token|class_embedding|latent|logit"
)

# The last part of a parameter's name, or more where that is not enough -> whether it decays. First match counts.
GROUPS = [
    (r".*\.(bias|in_proj_bias)", False),
    (r"logit_scale|logit_bias", False),
    (r"(text\.|visual\.|visual\.attnpool\.)?positional_embedding", False),
    (r"visual\.class_embedding", False),
    (r"visual\.trunk\.(pos_embed|cls_token|reg_token)", False),
    (r".*\b(ln_1|ln_2|ln_pre|ln_post|ln_final)\.weight", False),
    (r".*\.bn\d\.weight|visual\.layer\d\.\d\.downsample\.1\.weight", False),
    (r"visual\.trunk\..*\b(norm\d?|fc_norm)\.weight", False),
    (r"visual\.trunk\.(stem\.1|stages\.\d\.downsample\.0)\.weight", False),  # norms
    (r"visual\.trunk\.(stem\.0|stages\.\d\.downsample\.1)\.weight", True),  # convolutions
    (r".*\.gamma", False),
    (r".*\.(conv\d|conv_dw|proj|qkv)\.weight|visual\.layer\d\.\d\.downsample\.0\.weight", True),
    (r".*\.in_proj_weight|.*\.out_proj\.weight|.*\.[qkvc]_proj\.weight", True),
    (r".*\.(c_fc|fc1|fc2)\.weight", True),
    (r"(text\.)?token_embedding\.weight", True),
    (r"visual\.proj|(text\.)?text_projection(\.weight)?", True),
]


@pytest.mark.parametrize(
    ("name", "shape", "decayed"),
    [
        ("visual.conv1.weight", (4, 3, 2, 2), True),
        ("transformer.resblocks.0.mlp.c_fc.weight", (8, 4), True),
        ("transformer.resblocks.0.mlp.c_fc.bias", (8,), False),
        ("ln_final.weight", (4,), False),
        ("logit_scale", (), False),
        ("positional_embedding", (77, 4), False),
    ],
)
def test_gains_biases_temperature_and_exempt_names_do_not_decay(
    name: str, shape: tuple[int, ...], decayed: bool
) -> None:
    assert is_decayed(name, torch.zeros(shape), {"positional_embedding"}) is decayed


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("ViT-H-14", (0.9, 0.98, 1e-6)),
        ("convnext_large_d", (0.9, 0.999, 1e-8)),
        ("coca_ViT-L-14", (0.9, 0.98, 1e-6)),
    ],
)
def test_constants_follow_the_model_family_unless_given(model: str, expected: tuple[float, ...]) -> None:
    assert adamw_settings(OptimConfig(), model) == expected
    assert adamw_settings(OptimConfig(beta2=0.95, eps=1e-3), model) == (0.9, 0.95, 1e-3)


def test_the_fused_update_leaves_everything_alone_where_found_inf_is_one() -> None:
    layer = nn.Linear(2, 2)
    optimizer = build_optimizer(layer, OptimConfig(lr=0.1), "x", ())
    layer(torch.ones(1, 2)).sum().backward()
    before = [p.clone() for p in layer.parameters()]
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), None
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    assert all(float(state["step"]) == 0 for state in optimizer.state.values())
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


def _parameters(name: str) -> tuple[dict[str, nn.Parameter], set[str]]:
    """Names and shapes of a model's parameters, without their memory; and what the model exempts."""
    with torch.device("meta"):
        model = models.build_model(models.load_model_config(name))
    return dict(model.named_parameters()), model.no_weight_decay()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_of_every_model_is_in_the_group_that_the_table_says(name: str) -> None:
    parameters, exempt = _parameters(name)
    assert parameters
    wrong = []
    for key, parameter in parameters.items():
        expected = next((decays for pattern, decays in GROUPS if re.fullmatch(pattern, key)), "in no pattern")
        if is_decayed(key, parameter, exempt) != expected:
            wrong.append((key, tuple(parameter.shape), expected))
    assert wrong == []


@pytest.mark.parametrize("name", OTHERS)
def test_what_decays_in_other_trunks_is_no_gain_bias_position_or_token(name: str) -> None:
    parameters, exempt = _parameters(name)
    wrong = [
        (key, tuple(parameter.shape))
        for key, parameter in parameters.items()
        # A depthwise convolution of one pixel is a gain by another name.
        if parameter.shape[1:] != (1, 1, 1) and is_decayed(key, parameter, exempt) == bool(NO_MATRIX.search(key))
    ]
    assert wrong == []


def test_the_parameters_without_decay_of_a_small_model() -> None:
    parameters, exempt = _parameters("tiny-test")
    spared = {key for key, parameter in parameters.items() if not is_decayed(key, parameter, exempt)}
    assert {key for key in spared if "resblocks" not in key} == {
        "logit_scale", "positional_embedding", "ln_final.weight", "ln_final.bias", "visual.class_embedding",
        "visual.positional_embedding", "visual.ln_pre.weight", "visual.ln_pre.bias", "visual.ln_post.weight",
        "visual.ln_post.bias",
    }  # fmt: skip
    inside = {key.split("resblocks.0.")[1] for key in spared if "transformer.resblocks.0." in key}
    assert inside == {
        "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "attn.in_proj_bias", "attn.out_proj.bias",
        "mlp.c_fc.bias", "mlp.c_proj.bias",
    }  # fmt: skip


def test_the_groups_are_told_in_one_line() -> None:
    layer = nn.Linear(1000, 100)
    line = describe_optimizer(build_optimizer(layer, OptimConfig(wd=0.1), "ViT-x", ()))
    assert line.startswith("AdamW, betas 0.9 and 0.98, eps 1e-06; decay 0.1 on 1 tensors of 0.10 M")
    assert "none on 1 tensors of 0.00 M" in line
