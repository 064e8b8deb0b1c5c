"""From a PIL image to the tower's input, as OpenCLIP prepares it. Pillow and torch only, no model.

The training transform here is for users of the library; the trainer's loader has its own, on the device.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.config import PreprocessConfig, pair

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class InferenceTransform:
    """PIL image to a normalised float tensor [3,h,w]: resize by the configured mode, centre crop or pad, normalise."""

    def __init__(self, config: PreprocessConfig) -> None:
        self.config = config
        self.size = pair(config.size)

    def __call__(self, image: Image.Image) -> Tensor:
        return normalize(self.resize(image), self.config)

    def resize(self, image: Image.Image) -> Tensor:
        """PIL image to uint8 [3,h,w]: what the tower sees before normalisation."""
        image = image.convert("RGB")
        height, width = self._scaled_size(image.height, image.width)
        if (width, height) != image.size:
            image = image.resize((width, height), _FILTERS[self.config.interpolation])
        return _to_tensor(_center_crop_or_pad(image, self.size, self.config.fill_color))

    def _scaled_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width before the crop. The rounding is that of the transforms OpenCLIP uses."""
        target_height, target_width = self.size
        if self.config.resize_mode == "squash":
            return self.size
        if self.config.resize_mode == "shortest" and target_height == target_width:
            shorter, longer = min(height, width), max(height, width)
            scaled = int(target_height * longer / shorter)
            return (target_height, scaled) if height <= width else (scaled, target_height)
        ratios = (height / target_height, width / target_width)
        ratio = max(ratios) if self.config.resize_mode == "longest" else min(ratios)
        return max(1, round(height / ratio)), max(1, round(width / ratio))


class TrainTransform:
    """PIL image to a normalised float tensor [3,h,w] through a random resized crop.

    Draws from torch's global generator. `scale` is the range of the crop's share of the area; aspect ratios
    lie between 3/4 and 4/3, as in Inception training.
    """

    def __init__(self, config: PreprocessConfig, scale: tuple[float, float] = (0.9, 1.0)) -> None:
        self.config = config
        self.size = pair(config.size)
        self.scale = scale

    def __call__(self, image: Image.Image) -> Tensor:
        image = image.convert("RGB")
        top, left, height, width = self._draw_box(image.height, image.width)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((self.size[1], self.size[0]), _FILTERS[self.config.interpolation])
        return normalize(_to_tensor(image), self.config)

    def _draw_box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a random crop, the largest central one if ten draws do not fit."""
        for _ in range(10):
            area = height * width * _uniform(*self.scale)
            aspect = math.exp(_uniform(math.log(3 / 4), math.log(4 / 3)))
            crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top = int(torch.randint(0, height - crop_height + 1, (1,)))
                left = int(torch.randint(0, width - crop_width + 1, (1,)))
                return top, left, crop_height, crop_width
        crop_width = min(width, round(height * 4 / 3))
        crop_height = min(height, round(width * 4 / 3))
        return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def normalize(image: Tensor, config: PreprocessConfig) -> Tensor:
    """uint8 [...,3,h,w] to float with the configured mean and standard deviation of each channel."""
    mean, std = (torch.tensor(values, device=image.device).view(3, 1, 1) for values in (config.mean, config.std))
    return image.float().div(255).sub(mean).div(std)


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _center_crop_or_pad(image: Image.Image, size: tuple[int, int], fill: int) -> Image.Image:
    """The middle of the image; where the image is smaller, it is in the middle of a filled canvas."""
    height, width = size
    if image.height < height or image.width < width:
        canvas = Image.new("RGB", (max(width, image.width), max(height, image.height)), (fill, fill, fill))
        canvas.paste(image, (max(0, (width - image.width) // 2), max(0, (height - image.height) // 2)))
        image = canvas
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def _uniform(low: float, high: float) -> float:
    return float(torch.empty(1).uniform_(low, high))
