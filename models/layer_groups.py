"""Which parameters of a tower belong together, from input to output: what locks and layer-wise decay count in.

A tower lists its groups by the beginnings of names (`layer_groups`); here they become parameters of the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from models.clip import CLIP

Prefixes = Sequence[Sequence[str]]
Groups = list[list[str]]


def image_groups(model: CLIP) -> Groups:
    """Names of the image tower's parameters, as in the state dict, from the patches to the projection."""
    return _named(model.visual, model.visual.layer_groups(), "visual.")


def text_groups(model: CLIP) -> Groups:
    """Names of the text tower's parameters, as in the state dict, from the embeddings to the projection."""
    return _named(model.text_tower, model.text_tower.layer_groups(), "text." if model.config.custom_text else "")


def stack_groups(stem: Sequence[str], stack: str, depth: int, after: Sequence[str], head: str) -> Prefixes:
    """The groups of a transformer: stem, each block, the last block with what follows it, projection."""
    blocks = [[f"{stack}.{index}"] for index in range(depth)]
    last = blocks.pop() if blocks else []
    return [list(stem), *blocks, [*last, *after], [head]]


def _named(tower: nn.Module, prefixes: Prefixes, root: str) -> Groups:
    names = [name for name, _ in tower.named_parameters()]
    groups = [[root + name for name in names if _begins(name, group)] for group in prefixes]
    return [group for group in groups if group]


def _begins(name: str, prefixes: Sequence[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
