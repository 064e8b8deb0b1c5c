"""Fits position embeddings to another image size or context length. Pure functions on a state dict."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip import CLIP
from models.errors import CheckpointError

Grid = tuple[int, int]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Resized:
    """One tensor that was resampled: its state-dict key, its shapes, and how (with the grids)."""

    key: str
    old_shape: Shape
    new_shape: Shape
    method: str

    def __str__(self) -> str:
        return f"{self.key} {list(self.old_shape)} -> {list(self.new_shape)}: {self.method}"


def resize_positions(model: CLIP, state: dict[str, Tensor]) -> list[Resized]:
    """Replaces, in `state`, each position embedding whose number of positions differs from the model's.

    Raises CheckpointError where the old grid cannot be known because it is not square.
    """
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    resized = []
    for key in position_keys(model):
        old = state.get(key)
        if old is None or tuple(old.shape) == shapes[key] or not _same_width(old.shape, shapes[key]):
            continue
        state[key], method = _resize(model, key, old, shapes[key])
        resized.append(Resized(key, tuple(old.shape), shapes[key], method))
    return resized


def position_keys(model: CLIP) -> list[str]:
    """State-dict keys of the position embeddings that can be resized."""
    text_key = "text.positional_embedding" if model.config.custom_text else "positional_embedding"
    known = [
        "visual.positional_embedding",
        "visual.attnpool.positional_embedding",
        "visual.trunk.pos_embed",
        text_key,
    ]
    parameters = dict(model.named_parameters())
    return [key for key in known if key in parameters]


def _same_width(old: Shape | torch.Size, new: Shape) -> bool:
    return len(old) == len(new) and old[-1] == new[-1]


def _resize(model: CLIP, key: str, old: Tensor, new_shape: Shape) -> tuple[Tensor, str]:
    if not key.startswith("visual."):
        return _resize_line(old, new_shape[0]), f"linear, length {old.shape[0]} to {new_shape[0]}"
    visual: Any = model.visual
    if key == "visual.trunk.pos_embed":
        old_grid = _square_grid(key, old.shape[1] - visual.num_prefix_positions)
        resized = visual.resample_positions(old, old_grid)
    else:
        # One position before the grid: the class token's, or the mean's of an attention pool.
        old_grid = _square_grid(key, old.shape[0] - 1)
        resized = torch.cat([old[:1], _resize_grid(old[1:], old_grid, visual.grid_size)])
    return resized, f"bicubic, grid {_named(old_grid)} to {_named(visual.grid_size)}"


def _resize_grid(positions_ND: Tensor, old: Grid, new: Grid) -> Tensor:
    grid_1Dhw = positions_ND.float().T.reshape(1, -1, *old)
    resized = F.interpolate(grid_1Dhw, size=new, mode="bicubic", antialias=True, align_corners=False)
    return resized.flatten(2)[0].T.to(positions_ND.dtype).contiguous()


def _resize_line(positions_LD: Tensor, length: int) -> Tensor:
    resized = F.interpolate(positions_LD.float().T[None], size=length, mode="linear", align_corners=False)
    return resized[0].T.to(positions_LD.dtype).contiguous()


def _square_grid(key: str, num_cells: int) -> Grid:
    side = math.isqrt(max(num_cells, 0))
    if side == 0 or side * side != num_cells:
        raise CheckpointError(f"{key}: {num_cells} grid positions form no square, so they cannot be resized")
    return side, side


def _named(grid: Grid) -> str:
    return f"{grid[0]}x{grid[1]}"
