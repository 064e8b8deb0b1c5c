"""Image bytes to `uint8` pixels, and pixels to the model's size.

Knows no captions, shards or random numbers. JPEG goes through simplejpeg, whose pixels equal Pillow's
bit for bit in a third less time; every other format goes through Pillow. Colour conversion is Pillow's
`convert("RGB")`, EXIF orientation is ignored, both as OpenCLIP does it.
"""

from __future__ import annotations

import io
import re
import threading
import warnings

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from data.samples import SampleError

Box = tuple[int, int, int, int]  # top, left, height, width in pixels

_JPEG_MAGIC = b"\xff\xd8\xff"
_LOST_PIXELS = ("Premature end of JPEG file", "Corrupt JPEG data")
# A few surplus bytes before the end-of-image marker are a sloppy encoder's; a long run is a hole filled with zeros.
_SURPLUS = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_MAX_SURPLUS_BYTES = 256


def decode_rgb(data: bytes, max_pixels: int, smallest: tuple[int, int] = (0, 0)) -> np.ndarray:
    """The picture in `data` as uint8 [H, W, 3]; a JPEG reduced as far as it stays at least `smallest` (h, w), if given.

    Raises SampleError: "empty_image" for no bytes, "too_many_pixels" when the header announces more than
    `max_pixels` (nothing is decoded then), "undecodable_image" for everything that is not a whole picture.
    """
    if not data:
        raise SampleError("empty_image")
    try:
        pixels = _decode_jpeg(data, max_pixels, smallest) if data.startswith(_JPEG_MAGIC) else None
        return _decode_any(data, max_pixels) if pixels is None else pixels
    except SampleError:
        raise
    except Image.DecompressionBombError as error:
        raise SampleError("too_many_pixels", str(error)) from error
    except UnidentifiedImageError as error:
        raise SampleError("undecodable_image", f"{len(data)} bytes that are no image of a known format") from error
    except Exception as error:  # Decoders fed with arbitrary bytes raise almost anything: struct.error, KeyError...
        raise SampleError("undecodable_image", str(error)) from error


def _decode_jpeg(data: bytes, max_pixels: int, smallest: tuple[int, int]) -> np.ndarray | None:
    """uint8 [H, W, 3], or None when Pillow has to judge; SampleError when part of the picture is missing."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        _check_pixels(height, width, max_pixels)
        if colorspace in ("CMYK", "YCCK"):
            return _rgb_of_cmyk(simplejpeg.decode_jpeg(data, colorspace="CMYK"))
        return simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=smallest[0], min_width=smallest[1])
    except ValueError as error:
        if _lost_pixels(str(error)):
            raise SampleError("undecodable_image", str(error)) from error
        return None


def _lost_pixels(warning: str) -> bool:
    """Whether libjpeg's warning means grey in place of pixels, which Pillow passes on as a good picture."""
    surplus = _SURPLUS.search(warning)
    harmless = surplus is not None and int(surplus[1]) <= _MAX_SURPLUS_BYTES
    return warning.startswith(_LOST_PIXELS) and not harmless


def _rgb_of_cmyk(cmyk: np.ndarray) -> np.ndarray:
    """Pillow's RGB of a CMYK JPEG [H, W, 4], which stores inverted inks (Adobe's convention, assumed for all)."""
    height, width, _ = cmyk.shape
    return np.array(Image.frombytes("CMYK", (width, height), cmyk.tobytes(), "raw", "CMYK;I").convert("RGB"))


def _decode_any(data: bytes, max_pixels: int) -> np.ndarray:
    with _quiet_pillow, Image.open(io.BytesIO(data)) as image:
        _check_pixels(image.height, image.width, max_pixels)
        return np.array(image.convert("RGB"))  # a copy: what torch takes has to be writable


def _check_pixels(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise SampleError("too_many_pixels", f"{width}x{height}, at most {max_pixels}")


class _QuietPillow:
    """Keeps Pillow's remarks on odd pictures (palettes, EXIF, sizes) off the log, from any number of threads.

    `warnings.catch_warnings` alone is not safe with threads: two that overlap restore each other's filters.
    Only the first one in saves the filters and only the last one out restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._saved = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._saved.__exit__(None, None, None)


_quiet_pillow = _QuietPillow()


def resize_crop(image: np.ndarray, box: Box, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """The part `box` of `image` (uint8 [H, W, 3]) at `size` (h, w): uint8 [3, h, w].

    Antialiased "bicubic" or "bilinear", within one grey level of Pillow's resize: 99.5 % of the values equal
    it, and of bicubic ones about one in a hundred thousand is two levels off.
    """
    top, left, height, width = box
    crop = torch.from_numpy(np.ascontiguousarray(image[top : top + height, left : left + width]))
    crop = crop.permute(2, 0, 1)[None]
    if (height, width) == tuple(size):
        return crop[0]
    return F.interpolate(crop, size=tuple(size), mode=interpolation, antialias=True, align_corners=False)[0]


def header_of(data: bytes) -> tuple[str, int, int]:
    """Format ("JPEG", "PNG"), height and width as the header announces them; SampleError when there is none."""
    try:
        with _quiet_pillow, Image.open(io.BytesIO(data)) as image:
            return image.format or "unknown", image.height, image.width
    except Exception as error:  # as in decode_rgb
        raise SampleError("undecodable_image" if data else "empty_image", str(error)) from error
