"""Photo-like pictures and shards of them, for benchmarks. Knows no loader.

A photograph's detail decides what its JPEG costs to decode: here octaves of noise whose amplitude falls with
frequency as in natural scenes (Field 1987), shapes with sharp edges and strokes like small print, with as much
fine detail as brings the file to the size that is asked for.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

_MEAN, _LUMA, _CHROMA = 118.0, 38.0, 12.0  # grey level, and deviations of it
_MOST_DETAIL = 64.0
_BISECTIONS = 10
_WORDS = (
    "a an the photo of red blue old small large wooden stone house dog cat street market boat river mountain "
    "table with two three people in on near under morning light rain snow blurred vintage isolated white background "
    "close-up stock image illustration happy woman man child garden flowers kitchen design modern for sale new"
)


@dataclass(frozen=True)
class PictureKind:
    """JPEGs of one size: `short` side in pixels (the other is 4/3 of it), quality, and the file's size."""

    short: int
    quality: int
    kib: int


KINDS = (PictureKind(384, 90, 50), PictureKind(512, 95, 120), PictureKind(1024, 90, 220))


def photo(height: int, width: int, seed: int, detail: float = 8.0) -> Image.Image:
    """A photo-like RGB picture; `detail` is the deviation of its fine structure in grey levels."""
    scene, fine = _layers(height, width, seed)
    return _picture(scene, fine, detail)


def photo_jpeg(kind: PictureKind, seed: int) -> bytes:
    """A 4:2:0 JPEG of `kind`, landscape or portrait, with as much detail as its file size holds."""
    sides = kind.short, kind.short * 4 // 3
    scene, fine = _layers(*(sides if seed % 3 else sides[::-1]), seed)
    low, high = 0.0, _MOST_DETAIL
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_small = len(_encode(_picture(scene, fine, middle), kind.quality)) < kind.kib * 1024
        low, high = (middle, high) if is_small else (low, middle)
    return _encode(_picture(scene, fine, low), kind.quality)


def write_shards(folder: Path, kind: PictureKind, num_shards: int, per_shard: int, num_pictures: int) -> list[Path]:
    """Shards of jpg, txt and json in `folder`; `num_pictures` different pictures, repeated under new captions."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [photo_jpeg(kind, seed) for seed in range(num_pictures)]
    paths = [folder / f"{number:05d}.tar" for number in range(num_shards)]
    for number, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for index in range(number * per_shard, (number + 1) * per_shard):
                _add(tar, f"{index:09d}.jpg", pictures[index % num_pictures])
                _add(tar, f"{index:09d}.txt", caption(index).encode())
                _add(tar, f"{index:09d}.json", f'{{"key": "{index:09d}", "caption": "{caption(index)}"}}'.encode())
    return paths


def caption(seed: int) -> str:
    """Five to fifteen words."""
    random = np.random.default_rng(seed)
    return " ".join(random.choice(_WORDS.split(), random.integers(5, 16)))


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _layers(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The scene and its fine structure of deviation 1, float [H, W, 3] and [H, W, 1]."""
    random = np.random.default_rng(seed)
    luma = _octaves(height, width, 2.0, random)[..., None]
    chroma = np.stack([_octaves(height, width, 2.0, random) for _ in range(3)], axis=-1)
    smooth = Image.fromarray(_bytes(_MEAN + _LUMA * luma + _CHROMA * chroma))
    _draw_shapes(smooth, random)
    return np.asarray(smooth, dtype=np.float64), _octaves(height, width, 1.0, random)[..., None]


def _octaves(height: int, width: int, exponent: float, random: np.random.Generator) -> np.ndarray:
    """Noise [H, W] of mean 0 and deviation 1, its amplitude falling with frequency to the power of `exponent`."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = np.maximum(frequency, 1 / max(height, width)) ** -exponent
    amplitude[0, 0] = 0
    noise = np.fft.irfft2(amplitude * np.exp(2j * np.pi * random.random(frequency.shape)), (height, width))
    return noise / noise.std()


def _draw_shapes(image: Image.Image, random: np.random.Generator) -> None:
    """Some discs and boxes, and a few lines of strokes like print."""
    draw = ImageDraw.Draw(image)
    side = min(image.size)
    for number in range(6):
        x, y, size = random.random() * image.width, random.random() * image.height, side * random.uniform(0.05, 0.25)
        shape = draw.ellipse if number % 2 else draw.rectangle
        shape((x, y, x + size, y + size * 0.7), fill=tuple(random.integers(0, 256, 3).tolist()))
    height = max(6, side // 40)
    for line in range(3):
        for column in range(12):
            x, y = side // 20 + column * height, side // 10 + 2 * line * height
            draw.text((x, y), chr(97 + int(random.integers(26))), fill=(20, 20, 20))


def _picture(scene: np.ndarray, fine: np.ndarray, detail: float) -> Image.Image:
    return Image.fromarray(_bytes(scene + detail * fine))


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)


def _encode(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return file.getvalue()
