from __future__ import annotations

import dataclasses
import random as python_random

import numpy as np
import pytest
import torch

from data.augment import AugmentConfig, draw_augmentations, parse_aug_cfg, sample_crop
from data.errors import DataConfigError
from data.randomness import KeyedRandom

DRAWS = 3000


def crops(height: int, width: int, aug: AugmentConfig) -> np.ndarray:
    return np.array([sample_crop(height, width, aug, KeyedRandom(0, i)) for i in range(DRAWS)])


def same_distribution(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Two-sample Kolmogorov-Smirnov at a level of one in a thousand."""
    values = np.sort(np.concatenate([ours, theirs]))
    gap = np.searchsorted(np.sort(ours), values, "right") / len(ours) - np.searchsorted(
        np.sort(theirs), values, "right"
    ) / len(theirs)
    return bool(np.abs(gap).max() < 1.95 * np.sqrt(1 / len(ours) + 1 / len(theirs)))


def test_the_published_argument_list_is_understood() -> None:
    config = parse_aug_cfg(["use_timm=True", "scale=(0.5, 1.0)", "re_prob=0.4"])
    assert config == AugmentConfig(use_timm=True, scale=(0.5, 1.0), re_prob=0.4)


def test_nothing_given_is_openclips_default() -> None:
    assert parse_aug_cfg([]) == AugmentConfig()
    assert parse_aug_cfg([]).scale == (0.9, 1.0)
    assert draw_augmentations(parse_aug_cfg([]), (32, 32), KeyedRandom(0)) == {}


@pytest.mark.parametrize(
    ("pair", "field", "value"),
    [
        ("scale=[0.4,1]", "scale", (0.4, 1)),
        ("ratio=(0.9, 1.1)", "ratio", (0.9, 1.1)),
        ("ratio=None", "ratio", (3 / 4, 4 / 3)),
        ("color_jitter=0.4", "color_jitter", 0.4),
        ("color_jitter=(0.32, 0.32, 0.32, 0.08)", "color_jitter", (0.32, 0.32, 0.32, 0.08)),
        ("color_jitter_prob=0.8", "color_jitter_prob", 0.8),
        ("gray_scale_prob=0.2", "gray_scale_prob", 0.2),
        ("re_count=3", "re_count", 3),
        ("use_timm=False", "use_timm", False),
    ],
)
def test_each_field_of_openclip_is_parsed_as_a_literal(pair: str, field: str, value: object) -> None:
    assert getattr(parse_aug_cfg([pair]), field) == value


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("scael=(0.5, 1.0)", "did you mean 'scale'"),
        ("reprob=0.4", "did you mean 're_prob'"),
        ("hflip=0.5", "known: scale, ratio"),
        ("scale=0.4 1.0", "not a literal"),
        ("re_prob=__import__('os').getcwd()", "not a literal"),
        ("use_timm", "expected key=value"),
        ("use_timm=yes", "not a literal"),
        ("use_timm=1", "expected True or False"),
        ("scale=(1.0, 0.5)", "0 < low <= high"),
        ("scale=0.5", "expected .low, high."),
        ("scale=(0.5, 1.5)", "at most 1"),
        ("re_prob=1.5", "from 0 to 1"),
        ("re_prob='often'", "from 0 to 1"),
        ("re_count=0", "from 1 to 64"),
        ("color_jitter=(0.4, 0.4)", "brightness, contrast, saturation"),
        ("color_jitter=(0.4, 0.4, 0.4, 0.9)", "hue at most 0.5"),
    ],
)
def test_a_wrong_pair_is_refused_with_what_would_be_right(pair: str, message: str) -> None:
    with pytest.raises(DataConfigError, match=message):
        parse_aug_cfg([pair])


def test_the_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        AugmentConfig().re_prob = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(("height", "width"), [(100, 100), (480, 640), (64, 300), (1, 1), (1, 50), (2, 3), (700, 20)])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.08, 1.0)])
def test_crops_lie_inside_the_picture(height: int, width: int, scale: tuple[float, float]) -> None:
    boxes = crops(height, width, AugmentConfig(scale=scale))[:400]
    top, left, box_h, box_w = boxes.T
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (top + box_h <= height).all()
    assert (left + box_w <= width).all()


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(480, 640, (0.08, 1.0)), (224, 224, (0.9, 1.0)), (100, 180, (0.5, 1.0))]
)
def test_crops_are_distributed_as_torchvisions(height: int, width: int, scale: tuple[float, float]) -> None:
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(DRAWS)])
    ours = crops(height, width, AugmentConfig(scale=scale))
    for column in range(4):
        assert same_distribution(ours[:, column], theirs[:, column])
    assert same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])


def test_a_picture_too_long_for_any_crop_is_cut_in_the_middle() -> None:
    from torchvision.transforms import RandomResizedCrop

    aug = AugmentConfig(scale=(0.9, 1.0))
    for height, width in ((40, 1000), (1000, 40)):
        expected = RandomResizedCrop.get_params(torch.empty(3, height, width), [0.9, 1.0], [3 / 4, 4 / 3])
        assert sample_crop(height, width, aug, KeyedRandom(1)) == tuple(expected)


def timm_boxes(count: int, size: int) -> np.ndarray:
    """Boxes of timm's RandomErasing for single images, recovered from the pixels that it changed."""
    from timm.data.random_erasing import RandomErasing

    erasing = RandomErasing(1.0, mode="pixel", max_count=count, device="cpu")
    python_random.seed(0)
    torch.manual_seed(0)
    shares = []
    for _ in range(DRAWS):
        changed = (erasing(torch.full((1, size, size), 100.0)) != 100.0)[0]
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        extent = (
            [0, 0, 0, 0]
            if not len(rows)
            else [rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1]
        )
        shares.append([*map(int, extent), int(changed.sum())])
    return np.array(shares)


@pytest.mark.parametrize("count", [1, 3])
def test_erasing_boxes_are_distributed_as_timms(count: int) -> None:
    size, aug = 64, AugmentConfig(re_prob=1.0, re_count=count)
    theirs, ours = timm_boxes(count, size), []
    for i in range(DRAWS):
        changed = np.zeros((size, size), dtype=bool)
        for top, left, height, width in draw_augmentations(aug, (size, size), KeyedRandom(5, i))["erase"].tolist():
            changed[top : top + height, left : left + width] = True
        rows, columns = changed.any(1).nonzero()[0], changed.any(0).nonzero()[0]
        ours.append([rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1, changed.sum()])
    for column in range(5):
        assert same_distribution(np.array(ours)[:, column], theirs[:, column])


def test_a_share_re_prob_of_the_pictures_is_erased() -> None:
    aug = AugmentConfig(re_prob=0.4)
    erased = sum(bool(draw_augmentations(aug, (32, 32), KeyedRandom(2, i))["erase"].any()) for i in range(DRAWS))
    assert abs(erased / DRAWS - 0.4) < 0.03


def test_jitter_factors_keep_to_their_ranges_and_probability() -> None:
    aug = AugmentConfig(color_jitter=(0.4, 0.2, 1.5, 0.1), color_jitter_prob=0.8)
    jitter = torch.stack([draw_augmentations(aug, (32, 32), KeyedRandom(3, i))["jitter"] for i in range(DRAWS)])
    moved = (jitter[:, :4] != torch.tensor([1.0, 1.0, 1.0, 0.0])).any(1)
    assert abs(moved.float().mean() - 0.8) < 0.03
    low, high = jitter[:, :4].amin(0), jitter[:, :4].amax(0)
    assert (low >= torch.tensor([0.6, 0.8, 0.0, -0.1])).all()
    assert (high <= torch.tensor([1.4, 1.2, 2.5, 0.1])).all()
    assert (high - low > 0.98 * torch.tensor([0.8, 0.4, 2.5, 0.2])).all()
    orders = {tuple(order) for order in jitter[:, 4:].int().tolist()}
    assert len(orders) == 24


def test_a_single_jitter_strength_is_timms_three_without_hue() -> None:
    assert AugmentConfig(color_jitter=0.4).jitter_strength == (0.4, 0.4, 0.4, 0.0)
    assert AugmentConfig(color_jitter=(0.1, 0.2, 0.3)).jitter_strength == (0.1, 0.2, 0.3, 0.0)
    assert AugmentConfig(color_jitter=0).jitter_strength is None


def test_draws_have_the_same_keys_and_shapes_for_every_sample() -> None:
    aug = AugmentConfig(re_prob=0.5, re_count=3, gray_scale_prob=0.5, color_jitter=0.4, color_jitter_prob=0.5)
    shapes = set()
    for i in range(50):
        draws = draw_augmentations(aug, (32, 48), KeyedRandom(4, i))
        shapes.add(tuple((key, value.dtype, tuple(value.shape)) for key, value in draws.items()))
    assert shapes == {(("jitter", torch.float32, (8,)), ("gray", torch.bool, ()), ("erase", torch.int16, (3, 4)))}
