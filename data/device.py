"""The part of the train transform that runs on the device, on the whole batch: colour, erasing, normalisation.

Applies the draws made in `data.augment`; only the noise inside erased boxes is drawn here, from the
device's generator. No value is read back to the host and no sample has a loop of its own.
Colour operations are torchvision's ColorJitter and Grayscale on floats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from data.augment import JITTER_FACTORS, AugmentConfig

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, Pillow's "L"
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(JITTER_FACTORS)


class DeviceTransform(nn.Module):
    """uint8 [B, 3, H, W] and the batch's draws to normalised float32 [B, 3, H, W]."""

    scale: torch.Tensor
    offset: torch.Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], aug: AugmentConfig | None = None):
        super().__init__()
        self.aug = aug or AugmentConfig()
        mean_3, std_3 = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        # Not persistent: these belong to the data, not to a checkpoint.
        self.register_buffer("scale", (1 / (255 * std_3)).float().view(3, 1, 1), persistent=False)
        self.register_buffer("offset", (-mean_3 / std_3).float().view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor, draws: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """The batch as the towers take it. `draws` holds what `draw_augmentations` gave, stacked: [B, ...] each."""
        draws = draws or {}
        pixels = images.float()
        if "jitter" in draws:
            pixels = color_jitter(pixels / 255, draws["jitter"], with_hue=self._has_hue) * 255
        if "gray" in draws:
            pixels = torch.where(draws["gray"].view(-1, 1, 1, 1), _luma(pixels), pixels)
        pixels = torch.addcmul(self.offset, pixels, self.scale)
        return erase(pixels, draws["erase"]) if "erase" in draws else pixels

    @property
    def _has_hue(self) -> bool:
        strength = self.aug.jitter_strength
        return strength is None or strength[_HUE] > 0


def _luma(images: torch.Tensor) -> torch.Tensor:
    """Brightness of the pixels: [B, 3, H, W] to [B, 1, H, W]."""
    red, green, blue = images.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue).unsqueeze(1)


def color_jitter(images: torch.Tensor, jitter: torch.Tensor, with_hue: bool = True) -> torch.Tensor:
    """`images` float [B, 3, H, W] in [0, 1] under `jitter` float [B, 8]: four factors, then their order.

    Every sample has its own order, so each of the four turns does for each sample the operation whose turn it is.
    """
    factors, order = jitter[:, :JITTER_FACTORS], jitter[:, JITTER_FACTORS:].long()
    for turn in range(JITTER_FACTORS):
        operation = order[:, turn]
        images = _blend(images, operation, factors.gather(1, operation[:, None])[:, 0])
        if with_hue:
            shift = torch.where(operation == _HUE, factors[:, _HUE], torch.zeros_like(factors[:, _HUE]))
            images = torch.where((shift != 0).view(-1, 1, 1, 1), _shift_hue(images, shift), images)
    return images


def _blend(images: torch.Tensor, operation: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast and saturation: each mixes the picture with black, its mean grey, or its own grey."""
    is_hue = operation == _HUE
    keep = torch.where(is_hue, torch.ones_like(factor), factor)
    gray = _luma(images)
    mean = gray.mean(dim=(2, 3), keepdim=True)
    rest = 1 - factor
    to_gray = torch.where(operation == _SATURATION, rest, torch.zeros_like(rest))
    to_mean = torch.where(operation == _CONTRAST, rest, torch.zeros_like(rest))
    keep, to_gray, to_mean = (x.view(-1, 1, 1, 1) for x in (keep, to_gray, to_mean))
    return (keep * images + to_gray * gray + to_mean * mean).clamp_(0, 1)


def _shift_hue(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Turns the hue by `shift` [B] of a full circle; saturation and value in HSV stay (RGB -> HSV -> RGB)."""
    value, highest = images.max(dim=1)
    chroma = value - images.amin(dim=1)
    safe = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    red, green, blue = images.unbind(1)
    sixths = torch.stack([(green - blue) / safe, 2 + (blue - red) / safe, 4 + (red - green) / safe], dim=1)
    hue = sixths.gather(1, highest.unsqueeze(1)).squeeze(1) + 6 * shift.view(-1, 1, 1)
    # Each channel is value - chroma * ramp: the closed form of the six-sector table.
    channels = []
    for corner in (5, 3, 1):
        position = (hue + corner) % 6
        channels.append(value - chroma * torch.minimum(position, 4 - position).clamp_(0, 1))
    return torch.stack(channels, dim=1)


def erase(images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Fills `boxes` (int [B, n, 4]: top, left, height, width) of normalised `images` with N(0, 1) noise a pixel.

    The amount of noise drawn does not depend on the boxes, so nothing waits for the device.
    """
    height, width = images.shape[-2:]
    top, left, box_h, box_w = boxes.long().unsqueeze(-1).unbind(2)  # [B, n, 1] each
    row, column = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    in_rows, in_columns = (row >= top) & (row < top + box_h), (column >= left) & (column < left + box_w)
    inside = torch.zeros(images.shape[0], height, width, dtype=torch.bool, device=images.device)
    for box in range(boxes.shape[1]):
        inside |= in_rows[:, box, :, None] & in_columns[:, box, None, :]
    return torch.where(inside.unsqueeze(1), torch.randn_like(images), images)
