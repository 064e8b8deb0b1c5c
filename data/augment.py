"""Augmentation as configuration and random draws; the pixels are changed in `data.decode` and `data.device`.

Everything is drawn on the CPU from the sample's own key, so that neither the number of workers nor the
device has a say in it. Methods: random resized crop (Szegedy et al. 2014, arXiv:1409.4842, section 6),
random erasing (Zhong et al. 2017, arXiv:1708.04896), with the constants of torchvision and timm.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data.decode import Box
from data.errors import DataConfigError
from data.randomness import KeyedRandom

_ATTEMPTS = 10  # tries for a crop or an erasing box that fits, as in torchvision and timm
_ERASE_AREA = (0.02, 1 / 3)
_ERASE_ASPECT = (0.3, 1 / 0.3)

JITTER_FACTORS = 4  # brightness, contrast, saturation, hue; their order of application follows them


@dataclass(frozen=True)
class AugmentConfig:
    """OpenCLIP's `--aug-cfg`. What is given is applied, with or without `use_timm`.

    OpenCLIP itself drops `ratio` and `re_*` without `use_timm`, and the two probabilities with it.
    `color_jitter` without `color_jitter_prob` is always applied (timm's meaning).
    """

    scale: tuple[float, float] = (0.9, 1.0)  # share of the picture's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop, relative to pixels
    color_jitter: float | tuple[float, ...] | None = None  # strength, or brightness, contrast, saturation[, hue]
    color_jitter_prob: float | None = None
    gray_scale_prob: float | None = None
    re_prob: float | None = None
    re_count: int = 1
    use_timm: bool = False

    def __post_init__(self) -> None:
        _check_range("scale", self.scale, upper=1.0)
        _check_range("ratio", self.ratio, upper=math.inf)
        for name in ("color_jitter_prob", "gray_scale_prob", "re_prob"):
            _check_number(name, getattr(self, name), 0.0, 1.0)
        _check_jitter(self.color_jitter)
        if not _is_number(self.re_count) or self.re_count != int(self.re_count) or not 1 <= self.re_count <= 64:
            raise DataConfigError(f"--aug-cfg re_count={self.re_count!r}: expected a whole number from 1 to 64")
        if not isinstance(self.use_timm, bool):
            raise DataConfigError(f"--aug-cfg use_timm={self.use_timm!r}: expected True or False")

    @property
    def jitter_strength(self) -> tuple[float, float, float, float] | None:
        """Brightness, contrast, saturation and hue strengths; None when colours stay as they are."""
        if self.color_jitter is None or self.color_jitter_prob == 0:
            return None
        values = self.color_jitter if isinstance(self.color_jitter, tuple) else (self.color_jitter,) * 3
        brightness, contrast, saturation, hue = (*map(float, values), 0.0)[:JITTER_FACTORS]
        return (brightness, contrast, saturation, hue) if any(values) else None


def parse_aug_cfg(pairs: Sequence[str]) -> AugmentConfig:
    """`AugmentConfig` from "key=value" texts; values are Python literals, e.g. "scale=(0.5, 1.0)".

    Raises DataConfigError for an unknown key (naming the nearest), a value that is no literal or out of range.
    """
    fields = {f.name: f for f in dataclasses.fields(AugmentConfig)}
    values: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator:
            raise DataConfigError(f"--aug-cfg {pair!r}: expected key=value, e.g. scale='(0.5, 1.0)'")
        if key not in fields:
            raise DataConfigError(f"--aug-cfg: unknown key {key!r}{_nearest(key, list(fields))}")
        value = _literal(key, text)
        values[key] = fields[key].default if value is None else value
    return AugmentConfig(**values)


def _literal(key: str, text: str) -> Any:
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise DataConfigError(
            f"--aug-cfg {key}={text}: not a literal; write e.g. {key}=0.5 or {key}='(0.5, 1.0)'"
        ) from error
    return tuple(value) if isinstance(value, list) else value


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_range(name: str, value: object, upper: float) -> None:
    good = isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value))
    if not good or not 0 < value[0] <= value[1] <= upper:  # type: ignore[index]
        limit = "" if math.isinf(upper) else f" and high at most {upper:g}"
        raise DataConfigError(f"--aug-cfg {name}={value!r}: expected (low, high) with 0 < low <= high{limit}")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if value is not None and not (_is_number(value) and low <= value <= high):  # type: ignore[operator]
        raise DataConfigError(f"--aug-cfg {name}={value!r}: expected a number from {low:g} to {high:g}")


def _check_jitter(value: object) -> None:
    parts = value if isinstance(value, tuple) else (value,) * 3
    good = value is None or (len(parts) in (3, 4) and all(_is_number(part) and part >= 0 for part in parts))
    if not good or (len(parts) == JITTER_FACTORS and parts[3] > 0.5):
        raise DataConfigError(
            f"--aug-cfg color_jitter={value!r}: expected a strength, or (brightness, contrast, saturation[, hue]), "
            "none negative, hue at most 0.5"
        )


def sample_crop(height: int, width: int, aug: AugmentConfig, random: KeyedRandom) -> Box:
    """A crop of a `height` x `width` picture: area uniform in `scale`, log of width over height uniform in `ratio`.

    When no try fits, the largest central crop whose shape lies within `ratio`.
    """
    draws = random.uniforms(2 * _ATTEMPTS + 2).tolist()
    log_ratio = math.log(aug.ratio[0]), math.log(aug.ratio[1])
    for attempt in range(_ATTEMPTS):
        area = _between(draws[2 * attempt], aug.scale) * height * width
        aspect = math.exp(_between(draws[2 * attempt + 1], log_ratio))
        crop_w, crop_h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_w <= width and 0 < crop_h <= height:
            return _offset(draws[-2], height - crop_h), _offset(draws[-1], width - crop_w), crop_h, crop_w
    return _central_crop(height, width, aug.ratio)


def _central_crop(height: int, width: int, ratio: tuple[float, float]) -> Box:
    crop_h, crop_w = height, width
    if width / height < ratio[0]:
        crop_h = min(height, round(width / ratio[0]))
    elif width / height > ratio[1]:
        crop_w = min(width, round(height * ratio[1]))
    crop_h, crop_w = max(crop_h, 1), max(crop_w, 1)
    return (height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w


def draw_augmentations(aug: AugmentConfig, image_size: tuple[int, int], random: KeyedRandom) -> dict[str, torch.Tensor]:
    """The draws that `DeviceTransform` applies; keys and shapes depend on `aug` alone, so that batches stack.

    "jitter" float32 [8]: four factors, then the order of the four operations; "gray" bool [];
    "erase" int16 [re_count, 4]: top, left, height, width, all zero where nothing is erased.
    """
    draws: dict[str, torch.Tensor] = {}
    if aug.jitter_strength is not None:
        draws["jitter"] = _draw_jitter(aug, aug.jitter_strength, random)
    if aug.gray_scale_prob:
        draws["gray"] = torch.tensor(random.uniform() < aug.gray_scale_prob)
    if aug.re_prob:
        draws["erase"] = torch.tensor(_draw_boxes(aug, image_size, random), dtype=torch.int16)
    return draws


def _draw_jitter(aug: AugmentConfig, strength: tuple[float, float, float, float], random: KeyedRandom) -> torch.Tensor:
    """torchvision's ColorJitter: factors uniform in [max(0, 1 - s), 1 + s], hue shift in [-s, s] turns; any order."""
    applied, *units = random.uniforms(1 + JITTER_FACTORS).tolist()
    order = random.permutation(JITTER_FACTORS).tolist()
    if aug.color_jitter_prob is not None and applied >= aug.color_jitter_prob:
        return torch.tensor([1.0, 1.0, 1.0, 0.0, *order])
    factors = [_between(u, (max(0.0, 1 - s), 1 + s)) for u, s in zip(units[:3], strength[:3], strict=True)]
    return torch.tensor([*factors, _between(units[3], (-strength[3], strength[3])), *order])


def _draw_boxes(aug: AugmentConfig, image_size: tuple[int, int], random: KeyedRandom) -> list[Box]:
    """With probability `re_prob`, 1 to `re_count` boxes that share the erased area; the rest of the list is empty."""
    applied, count_draw = random.uniforms(2).tolist()
    none = (0, 0, 0, 0)
    if aug.re_prob is None or applied >= aug.re_prob:
        return [none] * aug.re_count
    count = 1 + _offset(count_draw, aug.re_count - 1)
    return [_erasing_box(image_size, count, random) if i < count else none for i in range(aug.re_count)]


def _erasing_box(image_size: tuple[int, int], count: int, random: KeyedRandom) -> Box:
    height, width = image_size
    draws = random.uniforms(2 * _ATTEMPTS + 2).tolist()
    for attempt in range(_ATTEMPTS):
        area = _between(draws[2 * attempt], _ERASE_AREA) * height * width / count
        aspect = math.exp(_between(draws[2 * attempt + 1], (math.log(_ERASE_ASPECT[0]), math.log(_ERASE_ASPECT[1]))))
        box_h, box_w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if box_h < height and box_w < width:
            return _offset(draws[-2], height - box_h), _offset(draws[-1], width - box_w), box_h, box_w
    return 0, 0, 0, 0


def _between(unit: float, limits: tuple[float, float]) -> float:
    return limits[0] + (limits[1] - limits[0]) * unit


def _offset(unit: float, most: int) -> int:
    """A whole number from 0 to `most` inclusive."""
    return int(unit * (most + 1))
