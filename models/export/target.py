"""What another library's form of a model owes: a reason where it cannot hold one, files, and features read back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image
from torch import Tensor

from models.clip import CLIP
from models.config import ModelConfig


@dataclass(frozen=True)
class Encoders:
    """What a library makes of files that it has read. Features are [B,E], of length 1, on the CPU.

    image: features of normalised pixels [B,3,h,w]; text: of token ids [B,L]; caption: of words, by the library's own
    tokenizer; prepare: a picture as normalised pixels [1,3,h,w], by its own preprocessing. None where the form has no
    such part.
    """

    image: Callable[[Tensor], Tensor]
    text: Callable[[Tensor], Tensor] | None = None
    prepare: Callable[[Image.Image], Tensor] | None = None
    caption: Callable[[str], Tensor] | None = None


class Target(Protocol):
    """One library. `tolerance`: by how much a number of a feature may differ after the way there and back."""

    name: str
    tolerance: float

    def refusal(self, config: ModelConfig) -> str | None:
        """Why this form cannot hold the model, and None if it can. Builds nothing."""
        ...

    def write(self, model: CLIP, folder: Path) -> None:
        """The files, into a folder that is there and empty."""
        ...

    def read(self, folder: Path, model: CLIP) -> Encoders:
        """The files as the library itself reads them, without a network. `model` tells sizes, no weights."""
        ...
