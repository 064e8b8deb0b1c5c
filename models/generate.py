"""Captions from a CoCa model, token by token: greedy, or sampled from the likeliest. Knows no tokenizer's rules."""

from __future__ import annotations

import torch
from torch import Tensor

from models.coca import CoCa


@torch.no_grad()
def generate(
    model: CoCa,
    image: Tensor,
    *,
    start_id: int,
    end_id: int,
    max_tokens: int = 30,
    min_tokens: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Tensor:
    """Token ids [B,L] for images [B,3,h,w], L at most `max_tokens`: start, caption, end, then the tower's padding.

    temperature 0 takes the likeliest token each time; else one is drawn (from torch's current generator) of the
    `top_k` likeliest, or of those that make up `top_p` of the probability (Holtzman et al. 2020, section 3.1).
    min_tokens: the end comes no earlier. The model should be in evaluation mode.
    """
    assert max_tokens <= model.config.text_cfg.context_length, "the text tower has no more positions"
    pad_id = model.config.text_cfg.pad_id
    _, image_tokens = model.visual.features_and_tokens(image)
    tokens = torch.full((len(image), 1), start_id, device=image.device)
    ended = torch.zeros(len(image), dtype=torch.bool, device=image.device)
    while tokens.shape[1] < max_tokens and not bool(ended.all()):  # Host sync: once a token.
        logits = model.next_logits(image_tokens, tokens).float()
        if tokens.shape[1] < min_tokens:
            logits[:, end_id] = -torch.inf
        following = _choose(logits, temperature, top_k, top_p).where(~ended, pad_id)
        tokens = torch.cat([tokens, following[:, None]], dim=1)
        ended |= following == end_id
    return tokens


def _choose(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """One id for each row [B]."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    shares, ids = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    # A token stays when those before it do not make up top_p yet, so the likeliest always does.
    left_out = shares.cumsum(dim=-1) - shares >= top_p
    if top_k is not None:
        left_out[:, top_k:] = True
    drawn = shares.masked_fill(left_out, 0).multinomial(1)
    return ids.gather(1, drawn)[:, 0]
