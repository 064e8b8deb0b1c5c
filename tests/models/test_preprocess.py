"""Transforms equal OpenCLIP's on any image, and need no torchvision."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models import InferenceTransform, PreprocessConfig, TrainTransform, create_model_and_transforms, normalize

SIZES = [(64, 64), (100, 37), (31, 90), (20, 24), (200, 199), (33, 1)]


def _image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def _openclip(config: PreprocessConfig, is_train: bool = False) -> Any:
    transform = pytest.importorskip("open_clip.transform", reason="compares with open_clip_torch")
    size = list(config.size) if isinstance(config.size, tuple) else config.size
    return transform.image_transform(
        size,
        is_train=is_train,
        mean=config.mean,
        std=config.std,
        resize_mode=config.resize_mode,
        interpolation=config.interpolation,
        fill_color=config.fill_color,
    )


@pytest.mark.parity
@pytest.mark.parametrize("size", [32, (32, 48)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_inference_pixels_equal_openclips(resize_mode: str, interpolation: str, size: int | tuple[int, int]) -> None:
    if resize_mode == "shortest" and interpolation == "bilinear" and size != 32:
        pytest.skip("OpenCLIP ignores the filter there")
    config = PreprocessConfig(size=size, resize_mode=resize_mode, interpolation=interpolation, fill_color=7)
    ours, theirs = InferenceTransform(config), _openclip(config)
    for width, height in SIZES[:5]:
        image = _image(width, height)
        torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=1e-6)


@pytest.mark.parity
def test_training_crops_equal_openclips_from_the_same_random_state() -> None:
    config = PreprocessConfig(size=32)
    ours, theirs = TrainTransform(config), _openclip(config, is_train=True)
    for seed in range(20):
        image = _image(*SIZES[seed % len(SIZES)])
        torch.manual_seed(seed)
        expected = theirs(image)
        torch.manual_seed(seed)
        torch.testing.assert_close(ours(image), expected, rtol=0, atol=1e-6)


def test_resize_gives_the_pixels_before_normalisation() -> None:
    config = PreprocessConfig(size=(32, 48))
    transform = InferenceTransform(config)
    pixels = transform.resize(_image(100, 37))
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 32, 48))
    assert torch.equal(normalize(pixels, config), transform(_image(100, 37)))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_any_image_mode_becomes_three_channels(mode: str) -> None:
    assert InferenceTransform(PreprocessConfig(size=16)).resize(_image(40, 30, mode)).shape == (3, 16, 16)


def test_an_extremely_narrow_image_survives() -> None:
    for resize_mode in ("shortest", "longest", "squash"):
        config = PreprocessConfig(size=16, resize_mode=resize_mode)
        assert InferenceTransform(config)(_image(300, 1)).shape == (3, 16, 16)
        assert TrainTransform(config)(_image(300, 1)).shape == (3, 16, 16)


def test_transforms_are_pickled() -> None:
    transform = pickle.loads(pickle.dumps(InferenceTransform(PreprocessConfig(size=16))))
    assert transform(_image(20, 20)).shape == (3, 16, 16)


def test_a_model_brings_transforms_of_its_own_size() -> None:
    model, train, inference = create_model_and_transforms("tiny-test", force_image_size=48)
    for transform in (train, inference):
        assert model(transform(_image(60, 50))[None])[0].shape == (1, 32)
