"""Pictures for the data tests, encoded in every way that shards hold."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image


def picture(height: int = 97, width: int = 131, seed: int = 0) -> Image.Image:
    """A smooth, noisy, colourful RGB picture: neither flat nor white noise, as photographs are."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(rows / 9 + seed), np.cos(columns / 13), np.sin((rows + columns) / 17 + 1)], axis=-1)
    noise = np.random.default_rng(seed).normal(0, 6, waves.shape)
    return Image.fromarray(np.clip(waves * 100 + 128 + noise, 0, 255).astype(np.uint8))


def encode(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    """The file of `image`."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def jpeg(height: int = 97, width: int = 131, seed: int = 0, **options: Any) -> bytes:
    """A JPEG file of `picture`."""
    return encode(picture(height, width, seed), "JPEG", **({"quality": 90} | options))


def decoded_by_pillow(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3], the way OpenCLIP's loader does it."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
