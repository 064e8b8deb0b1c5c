"""Locks and layer-wise decay: what stays trainable, for every kind of tower."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from models import CLIP, ConfigError
from models.layer_groups import image_groups, text_groups
from models.locks import Lock, layer_scales, lock_towers
from tests.models.conftest import FAMILIES

Build = Callable[[str], CLIP]


def trainable(model: CLIP) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("unlocked", [0, 1, 2])
def test_a_lock_leaves_the_last_groups_trainable_and_the_other_tower_alone(
    build: Build, name: str, side: str, unlocked: int
) -> None:
    model = build(name)
    own, other = image_groups(model), text_groups(model)
    if side == "text":
        own, other = other, own
    lock_towers(model, **{side: Lock(unlocked)})
    kept = {key for group in own[len(own) - unlocked :] for key in group}
    untouched = {key for group in other for key in group}
    assert trainable(model) == kept | untouched | {"logit_scale"}


def test_layer_norms_of_a_locked_tower_can_go_on_learning(build: Build) -> None:
    model = build("tiny-test")
    lock_towers(model, text=Lock(freeze_norms=False))
    own = {key for group in text_groups(model) for key in group}
    assert trainable(model) & own == {key for key in own if ".ln_" in f".{key}"}


def test_more_groups_than_a_tower_has_are_refused_with_their_number(build: Build) -> None:
    model = build("tiny-test")
    with pytest.raises(ConfigError, match="--lock-image-unlocked-groups 9: this tower has 4 groups of layers"):
        lock_towers(model, image=Lock(9))
    with pytest.raises(ConfigError, match="--lock-text-unlocked-layers 9: this tower has 4 groups of layers"):
        lock_towers(model, text=Lock(9))


def statistics(model: CLIP) -> list[torch.Tensor]:
    return [buffer.clone() for name, buffer in model.named_buffers() if "running_mean" in name]


@pytest.mark.parametrize("freeze", [True, False])
def test_running_statistics_stand_still_only_where_asked(build: Build, freeze: bool) -> None:
    model = build("tiny-test-rn")
    lock_towers(model, image=Lock(freeze_statistics=freeze))
    model.eval()
    model.train()  # as every step does
    before = statistics(model)
    model.encode_image(torch.randn(4, 3, *model.visual.image_size))
    same = [torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True)]
    assert all(same) if freeze else not any(same)


def test_statistics_of_unlocked_groups_go_on(build: Build) -> None:
    model = build("tiny-test-rn").train()
    lock_towers(model, image=Lock(unlocked_groups=2, freeze_statistics=True))  # layer4 and the pool
    modes = {name: norm.training for name, norm in model.named_modules() if isinstance(norm, nn.BatchNorm2d)}
    assert {name for name, training in modes.items() if training} == {n for n in modes if ".layer4." in n}


def test_a_tower_that_is_locked_whole_keeps_nothing_for_a_backward_pass(build: Build) -> None:
    model = build("tiny-test")
    lock_towers(model, image=Lock())
    assert not model.encode_image(torch.randn(2, 3, 32, 32)).requires_grad


def test_rates_fall_from_the_output_to_the_input(build: Build) -> None:
    model = build("tiny-test")
    scales = layer_scales(model, image_decay=0.5, text_decay=None)
    by_group = [{scales.get(key, 1.0) for key in group} for group in image_groups(model)]
    assert by_group == [{0.125}, {0.25}, {0.5}, {1.0}]
    assert set(scales) <= {key for group in image_groups(model) for key in group}


def test_without_decay_no_rate_is_scaled(build: Build) -> None:
    assert layer_scales(build("tiny-test"), None, 1.0) == {}
