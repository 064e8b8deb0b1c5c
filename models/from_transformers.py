"""Turns the state dict of transformers' CLIPModel or SiglipModel into ours. Knows names, no files and no model."""

from __future__ import annotations

from torch import Tensor

from models.transformers_keys import clip_to_ours, is_clip, is_siglip, siglip_to_ours

# Buffers that older releases stored: each is 0, 1, 2, ...
_POSITION_IDS = ".embeddings.position_ids"


def from_transformers(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The same weights under our names, and a line that says so; any other state dict as it is."""
    if not (is_clip(state) or is_siglip(state)):
        return state, []
    kept = {key: value for key, value in state.items() if not key.endswith(_POSITION_IDS)}
    if is_clip(kept):
        return clip_to_ours(kept), ["names of transformers' CLIPModel"]
    return siglip_to_ours(kept), ["names of transformers' SiglipModel"]
