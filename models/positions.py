"""Fits position embeddings to another image size or context length. Pure functions on a state dict.

Equal to OpenCLIP's resampling of the native towers, and to timm's of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip import CLIP
from models.config import pair
from models.errors import CheckpointError

Grid = tuple[int, int]
Shape = tuple[int, ...]
_BIAS_TABLE = ".relative_position_bias_table"


@dataclass(frozen=True)
class Resized:
    """One tensor that was resampled: its state-dict key, its shapes, and how (with the grids)."""

    key: str
    old_shape: Shape
    new_shape: Shape
    method: str

    def __str__(self) -> str:
        return f"{self.key} {list(self.old_shape)} -> {list(self.new_shape)}: {self.method}"


def resize_positions(model: CLIP, state: dict[str, Tensor], old_size: Grid | None = None) -> list[Resized]:
    """Replaces, in `state`, each position embedding that was learnt on another grid or length than the model's.

    old_size: (height, width) of the images that the weights were trained on, where it is known; without it an old
    grid is taken to be square, and one of as many cells to be the same. Raises CheckpointError where neither helps.
    """
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    resized = []
    for key in position_keys(model):
        old = state.get(key)
        if old is None or not _same_width(old.shape, shapes[key]):
            continue
        resampled = _resampled(model, key, old, shapes[key], old_size)
        if resampled is not None:
            state[key], method = resampled
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
    tables = [key for key in parameters if key.startswith("visual.trunk.") and key.endswith(_BIAS_TABLE)]
    return [key for key in known if key in parameters] + tables


def _same_width(old: Shape | torch.Size, new: Shape) -> bool:
    return len(old) == len(new) and old[-1] == new[-1]


def _resampled(
    model: CLIP, key: str, old: Tensor, new_shape: Shape, old_size: Grid | None
) -> tuple[Tensor, str] | None:
    """The fitted tensor, and how it was made; None where it fits as it is."""
    if not key.startswith("visual."):
        return None if tuple(old.shape) == new_shape else _resize_text(model, old, new_shape[0])
    if key.endswith(_BIAS_TABLE):
        return None if tuple(old.shape) == new_shape else _resize_bias_table(model, key, old)
    visual: Any = model.visual
    num_prefix = visual.num_prefix_positions if key == "visual.trunk.pos_embed" else 1
    num_cells = old.shape[-2] - num_prefix
    old_grid, is_sure = _old_grid(visual, num_cells, old_size)
    if tuple(old.shape) == new_shape and (old_grid == visual.grid_size or not is_sure):
        return None
    if old_grid is None:
        raise CheckpointError(_unknown_grid(key, num_cells))
    method = f"bicubic, grid {_named(old_grid)} to {_named(visual.grid_size)}"
    if key == "visual.trunk.pos_embed":
        return visual.resample_positions(old, old_grid), method
    return torch.cat([old[:num_prefix], _resize_grid(old[num_prefix:], old_grid, visual.grid_size)]), method


def _old_grid(visual: Any, num_cells: int, old_size: Grid | None) -> tuple[Grid | None, bool]:
    """The grid of `num_cells` positions, and whether it is known rather than inferred."""
    if old_size is not None:
        stride = _stride(visual)
        grid = (old_size[0] // stride[0], old_size[1] // stride[1])
        if grid[0] * grid[1] == num_cells:
            return grid, True
    side = math.isqrt(max(num_cells, 0))
    return ((side, side) if side > 0 and side * side == num_cells else None), False


def _stride(visual: Any) -> Grid:
    """Pixels of a cell (down, across). A trunk may have layers before its patches, so its grid says it."""
    own: tuple[int, int] | None = getattr(visual, "patch_size", None)
    if own is not None:
        return own
    (height, width), grid = pair(visual.image_size), visual.grid_size
    return max(height // grid[0], 1), max(width // grid[1], 1)


def _resize_text(model: CLIP, old_LD: Tensor, length: int) -> tuple[Tensor, str]:
    """The class token of a text tower that has one stands behind the text and keeps its position."""
    num_class = 1 if model.config.text_cfg.embed_cls else 0
    line, kept = old_LD.split([len(old_LD) - num_class, num_class])
    method = f"linear, length {len(line)} to {length - num_class}"
    return torch.cat([_resize_line(line, length - num_class), kept]), method


def _resize_bias_table(model: CLIP, key: str, old: Tensor) -> tuple[Tensor, str]:
    visual: Any = model.visual
    module = key.removeprefix("visual.trunk.").removesuffix(_BIAS_TABLE)
    table, window = visual.resample_bias_table(module, old)
    return table, f"interpolated, relative positions of a window of {_named(window)}"


def _resize_grid(positions_ND: Tensor, old: Grid, new: Grid) -> Tensor:
    grid_1Dhw = positions_ND.float().T.reshape(1, -1, *old)
    resized = F.interpolate(grid_1Dhw, size=new, mode="bicubic", antialias=True, align_corners=False)
    return resized.flatten(2)[0].T.to(positions_ND.dtype).contiguous()


def _resize_line(positions_LD: Tensor, length: int) -> Tensor:
    resized = F.interpolate(positions_LD.float().T[None], size=length, mode="linear", align_corners=False)
    return resized[0].T.to(positions_LD.dtype).contiguous()


def _unknown_grid(key: str, num_cells: int) -> str:
    return (
        f"{key}: {num_cells} grid positions form no square, so the image size of the weights must be known: put them "
        "into a folder with their model_config.json or open_clip_config.json, whose image_size is read"
    )


def _named(grid: Grid) -> str:
    return f"{grid[0]}x{grid[1]}"
