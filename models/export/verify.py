"""Whether an exported model gives the features of the one that it was made from: fixed pictures and captions."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from models.clip import CLIP
from models.config import PreprocessConfig
from models.errors import ConfigError, ExportError
from models.export.target import Encoders, Target
from models.factory import get_tokenizer
from models.preprocess import InferenceTransform

log = logging.getLogger(__name__)

CAPTIONS = (
    "a red circle above a blue square",
    "two dogs run along the beach in the evening light",
    "photo of an old bicycle, leaning on a wall",
)
# Libraries resize pictures by other code, which rounds otherwise; another crop or another mean would be tens.
GREY_LEVELS = 1.0


@dataclass(frozen=True)
class Agreement:
    """The largest differences of a feature's numbers; and for a picture, of its grey levels, in the mean."""

    image: float
    text: float | None
    caption: float | None
    grey_levels: float | None

    def __str__(self) -> str:
        parts = {"image": self.image, "text": self.text, "text by its own tokenizer": self.caption}
        told = [f"{name} {value:.1e}" for name, value in parts.items() if value is not None]
        if self.grey_levels is not None:
            told.append(f"picture by its own preprocessing {self.grey_levels:.2f} grey levels")
        return ", ".join(told)


@torch.no_grad()
def verify(model: CLIP, target: Target, encoders: Encoders) -> Agreement:
    """Compares features of the same input. Raises ExportError where they differ by more than the target allows."""
    pictures = [draw_picture(number) for number in range(3)]
    transform = InferenceTransform(model.config.preprocess)
    pixels = torch.stack([transform(picture) for picture in pictures])
    tokens = _tokens(model)
    image, text = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
    prepared = None if encoders.prepare is None else encoders.prepare(pictures[0])
    found = Agreement(
        image=_distance(encoders.image(pixels), image),
        text=None if encoders.text is None else _distance(encoders.text(tokens), text),
        caption=None if encoders.caption is None else _distance(encoders.caption(CAPTIONS[0]), text[:1]),
        grey_levels=None if prepared is None else _grey_levels(prepared, pixels[:1], model.config.preprocess),
    )
    exact = [value for value in (found.image, found.text, found.caption) if value is not None]
    if not max(exact) <= target.tolerance or not (found.grey_levels or 0.0) <= GREY_LEVELS:
        raise ExportError(
            f"{target.name} gives other features than this model: {found}; allowed are {target.tolerance:g}, and "
            f"{GREY_LEVELS:g} grey levels"
        )
    return found


def draw_picture(number: int) -> Image.Image:
    """A picture with slopes and edges, not square, the same everywhere."""
    height, width = 200 + 40 * number, 310 - 30 * number
    down, across = np.mgrid[0:height, 0:width]
    slopes = np.stack([across * 255 / width, down * 255 / height, (down + across) / 2], axis=-1)
    picture = Image.fromarray(slopes.astype(np.uint8))
    ImageDraw.Draw(picture).ellipse((40, 30, 150 + 20 * number, 120), fill=(220, 40 * number, 30))
    return picture


def _tokens(model: CLIP) -> Tensor:
    """Ids of the captions; where the tokenizer is not installed, ids of no meaning that end as texts do."""
    text = model.config.text_cfg
    try:
        return get_tokenizer(model.config)(list(CAPTIONS))
    except ConfigError as error:
        log.warning("captions are not compared, token ids are: %s", error)
    ids = (
        torch.arange(len(CAPTIONS) * text.context_length).reshape(len(CAPTIONS), -1) * 7919 % (text.vocab_size - 3) + 2
    )
    ids[:, -1] = text.eos_id if text.pool_type == "eos" else text.vocab_size - 1
    return ids


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).abs().max())


def _grey_levels(found: Tensor, wanted: Tensor, preprocess: PreprocessConfig) -> float:
    levels = 255 * torch.tensor(preprocess.std).view(3, 1, 1)
    return float(((found - wanted) * levels).abs().mean())
