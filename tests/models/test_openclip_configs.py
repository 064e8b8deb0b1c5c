"""Every model that OpenCLIP has a configuration for is here: the same settings, tensors, features, preprocessing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models import CLIP, ModelConfig, PreprocessConfig, build_model, list_models, load_model_config, pair
from tests.helpers.large_models import cut_stacks, fill, without_initialisation

pytestmark = pytest.mark.parity
open_clip = pytest.importorskip("open_clip", reason="compares with open_clip_torch")

CONFIGS = {path.stem: path for path in (Path(open_clip.__file__).parent / "model_configs").glob("*.json")}
# Their text towers need a configuration that only Hugging Face's hub has.
FROM_THE_HUB = {name for name, path in CONFIGS.items() if "hf_model_name" in json.loads(path.read_text())["text_cfg"]}
OFFLINE = sorted(set(CONFIGS) - FROM_THE_HUB)
# One of each mechanism, and small: what `make test` compares. `make parity` compares all.
EXAMPLES = (
    "ViT-B-32",
    "ViT-S-32-alt",
    "ViT-L-14-CLIPA",
    "ViT-B-32-quickgelu",
    "RN50",
    "convnext_base_w",
    "convnext_large_d_320",
    "ViT-B-16-SigLIP",
    "ViT-B-16-SigLIP2",
    "EVA02-B-16",
    "ViTamin-S",
    "MobileCLIP-S1",
    "MobileCLIP2-S0",
    "PE-Core-T-16-384",
    "swin_base_patch4_window7_224",
    "vit_medium_patch16_gap_256",
    "vit_relpos_medium_patch16_cls_224",
    "coca_ViT-B-32",
)
NAMES = [pytest.param(name, marks=[] if name in EXAMPLES else pytest.mark.slow) for name in OFFLINE]


def test_every_configuration_has_its_name_here() -> None:
    assert len(CONFIGS) == 144
    assert len(OFFLINE) == 134
    assert set(CONFIGS) <= set(list_models())
    assert set(EXAMPLES) <= set(OFFLINE)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_our_file_says_what_theirs_says(name: str) -> None:
    theirs = ModelConfig.from_dict(json.loads(CONFIGS[name].read_text()), name=name)
    ours = load_model_config(name)
    assert replace(ours, preprocess=theirs.preprocess) == theirs


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_images_are_prepared_as_the_published_weights_want_them(name: str) -> None:
    """Where the weights published under one name disagree, or there are none, CLIP's own numbers stay."""
    tags = open_clip.pretrained._PRETRAINED.get(name, {}).values()
    wanted = {(tuple(t["mean"]), tuple(t["std"]), t["interpolation"], t["resize_mode"]) for t in tags}
    default = PreprocessConfig()
    mean, std, interpolation, resize_mode = (
        wanted.pop() if len(wanted) == 1 else (default.mean, default.std, default.interpolation, default.resize_mode)
    )
    ours = load_model_config(name).preprocess
    assert (ours.mean, ours.std, ours.interpolation, ours.resize_mode) == (mean, std, interpolation, resize_mode)


def inputs(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Two images and two texts with an end each, one in the middle."""
    generator = torch.Generator().manual_seed(1)
    text = config.text_cfg
    images = torch.randn(2, 3, *pair(config.vision_cfg.image_size), generator=generator)
    tokens = torch.randint(3, min(40_000, text.vocab_size - 1), (2, text.context_length), generator=generator)
    end = text.eos_id if text.pool_type == "eos" else text.vocab_size - 1
    tokens[0, -1] = tokens[1, 5] = end
    tokens[1, 6:] = text.pad_id
    return images, tokens


def pair_of(name: str, depth: int) -> tuple[CLIP, nn.Module]:
    """Ours and OpenCLIP's, at full width, with the first blocks of every stack, on the same memory."""
    with without_initialisation():
        theirs = open_clip.create_model(name).eval()
        ours = build_model(load_model_config(name)).eval()
    for model in (ours, theirs):
        cut_stacks(model, depth)
    fill(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return ours, theirs


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
def test_tensors_have_the_same_names_and_shapes_at_full_depth(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = build_model(load_model_config(name)), open_clip.create_model(name, device="meta")
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_same_weights_give_the_same_features(name: str) -> None:
    ours, theirs = pair_of(name, depth=1)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images, tokens = inputs(ours.config)
    for mine, wanted in (
        (ours.encode_image(images, normalize=True), theirs.encode_image(images, normalize=True)),
        (ours.encode_text(tokens, normalize=True), theirs.encode_text(tokens, normalize=True)),
    ):
        assert not torch.equal(mine[0], mine[1])
        assert (mine - wanted).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_initial_values_are_drawn_as_openclips(name: str) -> None:
    """Mean distances from the mean of many values, exact equality of the constant ones.

    Not standard deviations: timm's truncated normal gives a few values at its bounds, a hundred times as large.
    """
    theirs, ours = open_clip.create_model(name).state_dict(), build_model(load_model_config(name)).state_dict()
    wrong = []
    for key, other in theirs.items():
        # OpenCLIP leaves a decoder's output matrix as its memory happens to be.
        if not other.is_floating_point() or key == "text_decoder.text_projection":
            continue
        wanted, mine = (float((tensor - tensor.mean()).abs().mean()) for tensor in (other, ours[key]))
        # At least five standard errors of the ratio of two estimates.
        bound = 6 / math.sqrt(other.numel())
        if not (torch.equal(ours[key], other) if wanted == 0 else abs(math.log(mine / wanted)) < bound):
            wrong.append((key, wanted, mine))
    assert not wrong
