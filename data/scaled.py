"""A part of a JPEG at the model's size, decoded no larger than it has to be. Knows no settings and no samples.

libjpeg can compute a picture of 1/2, 1/4 or 1/8 of the size right from the DCT coefficients; the other eighths
it computes slower than the whole. There a crop's edges lie between pixels, where torch's resize cannot begin. So
the resize begins some output pixels before the crop, where an edge of source and output pixels coincides, at the
exact scale, and what is surplus is cut off: rounding the edges instead was twice as far from the exact pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F

from data.decode import Box, decode_rgb

_FACTORS = (8, 4, 2)
_TOLERANCE = 1 / 8  # pixels of the smaller picture
_MOST_SURPLUS = 32  # output pixels
_ROUNDING = 1e-6  # keeps torch's floor(pixels * scale) from losing a pixel


class Span(NamedTuple):
    """One axis of a crop: source pixels `first` to `stop`, of whose output the first `surplus` pixels are cut off.

    `first` may be negative and `stop` beyond the picture by a few pixels: there the edge is repeated.
    """

    first: int
    stop: int
    surplus: int
    scale: float  # output pixels a source pixel


class View(NamedTuple):
    """How to decode and resize a crop: the picture's size over `factor`, then rows and columns of that."""

    factor: int
    rows: Span
    columns: Span


def load_crop(
    data: bytes, max_pixels: int, crop_of: Callable[[int, int], Box], size: tuple[int, int], interpolation: str
) -> torch.Tensor | None:
    """`resize_crop` of `decode_rgb` at less cost, or None where that saves nothing or `data` is no plain JPEG.

    crop_of: height and width of the whole picture to the box in it. Returns uint8 [3, h, w], on photographs
    within 2 grey levels of the exact pixels in the mean. Raises SampleError as `decode_rgb` does.
    """
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except Exception:  # whatever it is, the exact way says what is wrong with it
        return None
    if colorspace in ("CMYK", "YCCK"):
        return None
    view = plan_view(crop_of(height, width), size)
    if view is None:
        return None
    shape = -(-height // view.factor), -(-width // view.factor)
    image = decode_rgb(data, max_pixels, shape)
    # Pillow, which judges doubtful files, has decoded it whole.
    return resize_view(image, view, size, interpolation) if image.shape[:2] == shape else None


def plan_view(box: Box, size: tuple[int, int]) -> View | None:
    """The smallest picture that still has a pixel for each of the output's; None if that is the whole one."""
    top, left, height, width = box
    for factor in _FACTORS:
        if height < factor * size[0] or width < factor * size[1]:
            continue
        rows = _align(top / factor, height / factor, size[0])
        columns = _align(left / factor, width / factor, size[1])
        if rows is not None and columns is not None:
            return View(factor, rows, columns)
    return None


def _align(start: float, length: float, size: int) -> Span | None:
    """The span that makes `size` output pixels of `length` source pixels from `start` on, with the least surplus."""
    step = length / size  # source pixels an output pixel
    for surplus in range(_MOST_SURPLUS + 1):
        begin = start - surplus * step
        first = round(begin)
        if abs(begin - first) <= _TOLERANCE:
            pixels = math.ceil((size + surplus) * step * (1 - _ROUNDING / 2))
            return Span(first, first + pixels, surplus, (1 + _ROUNDING) / step)
    return None


def resize_view(image: np.ndarray, view: View, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """The view's part of `image` (uint8 [H, W, 3], reduced already) at `size`: uint8 [3, h, w]."""
    rows, columns = view.rows, view.columns
    crop = _cut(image, rows, columns)
    resized = F.interpolate(
        torch.from_numpy(crop).permute(2, 0, 1)[None],
        scale_factor=(rows.scale, columns.scale),
        mode=interpolation,
        antialias=True,
        align_corners=False,
        recompute_scale_factor=False,
    )
    return resized[0, :, rows.surplus : rows.surplus + size[0], columns.surplus : columns.surplus + size[1]]


def _cut(image: np.ndarray, rows: Span, columns: Span) -> np.ndarray:
    """The spans of `image`, contiguous, with edges repeated where they reach beyond it."""
    height, width, _ = image.shape
    part = image[max(0, rows.first) : rows.stop, max(0, columns.first) : columns.stop]
    beyond = (
        (max(0, -rows.first), max(0, rows.stop - height)),
        (max(0, -columns.first), max(0, columns.stop - width)),
        (0, 0),
    )
    return np.pad(part, beyond, mode="edge") if any(map(any, beyond)) else np.ascontiguousarray(part)
