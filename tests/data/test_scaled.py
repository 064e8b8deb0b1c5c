from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from data.augment import AugmentConfig, sample_crop
from data.decode import Box, decode_rgb, resize_crop
from data.randomness import KeyedRandom
from data.samples import SampleError
from data.scaled import load_crop, plan_view
from scripts.benchmark_pictures import photo
from tests.data.pictures import encode, jpeg, picture

NO_LIMIT = 10**9
SIZE = (224, 224)


@functools.cache
def photo_file(height: int, width: int, seed: int, quality: int, detail: float) -> bytes:
    return encode(photo(height, width, seed, detail), quality=quality)


def crops(count: int, scale: tuple[float, float], seed: int = 0) -> list[Callable[[int, int], Box]]:
    aug = AugmentConfig(scale=scale)
    return [lambda h, w, i=i: sample_crop(h, w, aug, KeyedRandom("test", seed, i)) for i in range(count)]


def exact(data: bytes, crop_of: Callable[[int, int], Box], size: tuple[int, int] = SIZE) -> torch.Tensor:
    image = decode_rgb(data, NO_LIMIT)
    return resize_crop(image, crop_of(*image.shape[:2]), size, "bicubic")


def mean_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.float() - b.float()).abs().mean().item()


@pytest.mark.parametrize("detail", [6, 14])
@pytest.mark.parametrize(
    ("height", "width", "quality"), [(461, 615, 95), (512, 683, 95), (701, 640, 75), (1024, 1365, 90), (999, 1501, 60)]
)
def test_crops_are_within_two_grey_levels_of_exact_ones(height: int, width: int, quality: int, detail: float) -> None:
    data = photo_file(height, width, 1, quality, detail)
    reduced = 0
    for crop_of in [*crops(6, (0.5, 1.0)), *crops(4, (0.9, 1.0), seed=1), lambda h, w: (0, 0, h, w)]:
        pixels = load_crop(data, NO_LIMIT, crop_of, SIZE, "bicubic")
        if pixels is not None:
            assert pixels.shape == (3, *SIZE)
            assert pixels.dtype == torch.uint8
            assert mean_difference(pixels, exact(data, crop_of)) <= 2.0
            reduced += 1
    assert reduced, "nothing was decoded at a smaller size"


@pytest.mark.parametrize(
    "box", [(1, 1, 640, 700), (359, 659, 640, 700), (3, 5, 651, 655), (0, 0, 1000, 1360), (1, 0, 999, 1359)]
)
def test_edges_between_pixels_and_at_the_border_stay_where_they_are(box: Box) -> None:
    """A shift by half a pixel of the smaller picture would show as 2 to 5 levels; a shift by one output pixel as 6."""
    data = photo_file(1000, 1360, 2, 92, 10)
    pixels = load_crop(data, NO_LIMIT, lambda h, w: box, SIZE, "bicubic")
    assert pixels is not None
    assert mean_difference(pixels, exact(data, lambda h, w: box)) < 1.6


def test_a_picture_below_twice_the_size_is_left_to_the_exact_way() -> None:
    assert plan_view((0, 0, 447, 1000), SIZE) is None
    view = plan_view((0, 0, 448, 1000), SIZE)
    assert view is not None
    assert view.factor == 2


@pytest.mark.parametrize(("side", "factor"), [(448, 2), (895, 2), (896, 4), (1791, 4), (1792, 8), (9000, 8)])
def test_the_smallest_picture_with_a_pixel_for_each_of_the_output_is_decoded(side: int, factor: int) -> None:
    view = plan_view((0, 0, side, side), SIZE)
    assert view is not None
    assert view.factor == factor


def test_a_view_covers_its_crop_for_any_box() -> None:
    random = np.random.default_rng(0)
    for _ in range(3000):
        size = int(random.integers(16, 400)), int(random.integers(16, 400))
        box = tuple(int(v) for v in (*random.integers(0, 500, 2), *random.integers(32, 3000, 2)))
        view = plan_view(box, size)
        if view is None:
            continue
        for axis, span in enumerate((view.rows, view.columns)):
            start, length = box[axis] / view.factor, box[2 + axis] / view.factor
            assert abs(span.first + span.surplus / span.scale - start) <= 0.13
            assert span.scale == pytest.approx(size[axis] / length, rel=1e-5)
            assert int((span.stop - span.first) * span.scale) >= size[axis] + span.surplus
            assert span.stop <= start + length + 1.1


@pytest.mark.parametrize("kind", ["png", "webp", "cmyk"])
def test_other_formats_are_left_to_the_exact_way(kind: str) -> None:
    image = picture(600, 700)
    data = encode(image.convert("CMYK")) if kind == "cmyk" else encode(image, kind.upper())
    assert load_crop(data, NO_LIMIT, lambda h, w: (0, 0, h, w), (64, 64), "bicubic") is None


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"keep_rgb": True}]
)
def test_every_kind_of_jpeg_is_reduced(options: dict[str, object]) -> None:
    data = encode(photo(301, 407, 3), **({"quality": 90} | options))
    for crop_of in crops(4, (0.6, 1.0)):
        pixels = load_crop(data, NO_LIMIT, crop_of, (64, 48), "bilinear")
        assert pixels is not None
        image = decode_rgb(data, NO_LIMIT)
        expected = resize_crop(image, crop_of(*image.shape[:2]), (64, 48), "bilinear")
        assert mean_difference(pixels, expected) <= 2.0


def test_grey_jpegs_are_reduced() -> None:
    data = encode(photo(300, 400, 3).convert("L"))
    pixels = load_crop(data, NO_LIMIT, lambda h, w: (0, 0, h, w), (64, 64), "bicubic")
    assert pixels is not None
    assert mean_difference(pixels, exact(data, lambda h, w: (0, 0, h, w), (64, 64))) <= 2.0


@pytest.mark.parametrize("tail", [b"", b"\xff\xd9", bytes(5000)])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_cut_jpeg_is_undecodable_as_in_exact_mode(tail: bytes, progressive: bool) -> None:
    data = jpeg(300, 400, progressive=progressive)
    for cut in range(len(data) // 3, len(data) - 50, len(data) // 12):
        reasons = []
        for load in (
            lambda cut_data: load_crop(cut_data, NO_LIMIT, lambda h, w: (0, 0, h, w), (64, 64), "bicubic"),
            lambda cut_data: decode_rgb(cut_data, NO_LIMIT),
        ):
            try:
                result = load(data[:cut] + tail)
                reasons.append("none" if result is None else "decoded")
            except SampleError as error:
                reasons.append(error.reason)
        # What the reduced decoder is not sure of, the exact way judges.
        assert reasons[0] in (reasons[1], "none"), f"{reasons} at {cut}"


def test_the_pixel_cap_counts_the_whole_picture() -> None:
    with pytest.raises(SampleError, match="too_many_pixels"):
        load_crop(jpeg(300, 400), 300 * 400 - 1, lambda h, w: (0, 0, h, w), (64, 64), "bicubic")


def test_bytes_that_are_no_picture_are_left_to_the_exact_way() -> None:
    for junk in (b"", b"x", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0" + bytes(100)):
        assert load_crop(junk, NO_LIMIT, lambda h, w: (0, 0, h, w), (64, 64), "bicubic") is None
