"""transformers' names and ours are two ways of writing the same tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.transformers_keys import (
    CLIP_RULES,
    SIGLIP_RULES,
    Rule,
    clip_to_ours,
    is_clip,
    is_siglip,
    ours_to_clip,
    ours_to_siglip,
    siglip_to_ours,
)

_WIDTH = 6


@pytest.mark.parametrize("rules", [CLIP_RULES, SIGLIP_RULES], ids=["clip", "siglip"])
def test_no_name_is_said_twice(rules: tuple[Rule, ...]) -> None:
    for side in ("theirs", "ours"):
        names = [name for rule in rules for name in getattr(rule, side)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("rules", "there", "back"),
    [(CLIP_RULES, clip_to_ours, ours_to_clip), (SIGLIP_RULES, siglip_to_ours, ours_to_siglip)],
    ids=["clip", "siglip"],
)
def test_there_and_back_is_the_same_state_bit_for_bit(rules, there, back) -> None:  # type: ignore[no-untyped-def]
    theirs = _their_state(rules)
    ours = there(theirs)
    assert not ours.keys() & (theirs.keys() - {"logit_scale", "logit_bias"})
    returned = back(ours)
    assert returned.keys() == theirs.keys()
    assert all(torch.equal(returned[key], theirs[key]) for key in theirs)


def test_query_key_and_value_are_stacked_in_this_order() -> None:
    theirs = {f"text_model.encoder.layers.3.self_attn.{x}_proj.bias": torch.full((2,), i) for i, x in enumerate("qkv")}
    ours = clip_to_ours(theirs)
    assert {key: value.tolist() for key, value in ours.items()} == {
        "transformer.resblocks.3.attn.in_proj_bias": [0, 0, 1, 1, 2, 2]
    }


def test_what_is_missing_or_unknown_keeps_its_name() -> None:
    state = {"text_model.encoder.layers.0.self_attn.q_proj.bias": torch.zeros(2), "extra": torch.zeros(1)}
    assert clip_to_ours(state).keys() == state.keys()


def test_the_two_classes_are_told_apart_by_their_keys() -> None:
    clip, siglip = _their_state(CLIP_RULES), _their_state(SIGLIP_RULES)
    assert (is_clip(clip), is_siglip(clip)) == (True, False)
    assert (is_clip(siglip), is_siglip(siglip)) == (False, True)
    assert not is_clip(clip_to_ours(clip))


def _their_state(rules: tuple[Rule, ...]) -> dict[str, Tensor]:
    """Random tensors under each of transformers' names, with two layers to a tower."""
    state = {}
    for rule in rules:
        rows = _WIDTH * sum(rule.our_parts) if rule.form != "scalar" else 1
        shape = (rows,) if rule.form == "scalar" or rule.theirs[0].endswith("bias") else (rows, 4)
        for name in rule.theirs:
            for layer in ("0", "11") if "*" in name else ("",):
                state[name.replace("*", layer)] = torch.randn(shape)
    return state
