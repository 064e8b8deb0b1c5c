"""One raw sample into what a batch needs: pixels, caption and random draws. Runs in the loader's workers.

Knows no lanes, batches or tokenizer. The train transform is OpenCLIP's: a random resized crop without
flip; what follows it (jitter, grey, erasing, normalisation) is drawn here and done on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from data.augment import AugmentConfig, draw_augmentations, sample_crop
from data.captions import CaptionConfig, draw_caption
from data.decode import Box, decode_rgb, resize_crop
from data.randomness import KeyedRandom
from data.samples import IMAGE_EXTENSIONS, RawSample, SampleError
from data.scaled import load_crop


class PrepareConfig(Protocol):
    """What `Preparer` reads of the loader's configuration."""

    @property
    def image_size(self) -> tuple[int, int]: ...

    @property
    def interpolation(self) -> str: ...

    @property
    def aug(self) -> AugmentConfig: ...

    @property
    def captions(self) -> CaptionConfig: ...

    @property
    def max_image_pixels(self) -> int: ...

    @property
    def image_decode(self) -> str: ...


@dataclass(slots=True)
class Prepared:
    """A sample ready for a batch. `image` uint8 [3, h, w]; `draws` has the same keys and shapes for every sample."""

    image: torch.Tensor
    caption: str
    draws: dict[str, torch.Tensor]


def image_of(raw: RawSample) -> bytes:
    """The bytes of the sample's picture; SampleError "no_image" when no member has a known extension."""
    for extension in IMAGE_EXTENSIONS:
        if extension in raw.fields:
            return raw.fields[extension]
    raise SampleError("no_image", f"members: {', '.join(sorted(raw.fields)) or 'none'}")


class Preparer:
    """Turns raw samples into `Prepared` ones. Holds only its configuration, so it can be sent to workers."""

    def __init__(self, config: PrepareConfig):
        self.config = config

    def prepare(self, raw: RawSample, random_key: tuple[int | str, ...]) -> Prepared:
        """The sample under the draws of `random_key`; SampleError when it cannot be used."""
        config = self.config
        # Before the picture: decoding for nothing is the dearest way to skip.
        caption = draw_caption(raw, config.captions, random_key)
        data, random = image_of(raw), KeyedRandom("prepare", *random_key)

        @functools.cache  # drawn once, whichever way asks first
        def crop_of(height: int, width: int) -> Box:
            return sample_crop(height, width, config.aug, random)

        pixels = self._fast(data, crop_of) if config.image_decode == "fast" else None
        if pixels is None:
            image = decode_rgb(data, config.max_image_pixels)
            box = crop_of(image.shape[0], image.shape[1])
            pixels = resize_crop(image, box, config.image_size, config.interpolation)
        return Prepared(pixels, caption, draw_augmentations(config.aug, config.image_size, random))

    def _fast(self, data: bytes, crop_of: Callable[[int, int], Box]) -> torch.Tensor | None:
        config = self.config
        return load_crop(data, config.max_image_pixels, crop_of, config.image_size, config.interpolation)
