"""How the weights of transformers' CLIPModel and SiglipModel are named and cut, against ours: a mapping for both ways.

Pure tables and pure functions on state dicts. Knows no file, no configuration and nothing of transformers itself.
CLIPModel is the native pair of towers with the text at the top level; SiglipModel is timm's SigLIP trunk
(`visual.trunk.`) with the text under `text.`. "Theirs" is transformers' name, "ours" OpenCLIP's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["same", "transposed", "batched", "scalar"]
_QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Rule:
    """Which tensors of theirs are which of ours; `*` is the number of a layer.

    Stacked along the first dimension, both sides are one tensor; `our_parts` are the relative sizes of our pieces,
    theirs are equal. `form` is what ours is to theirs: the same, transposed, with a first dimension of 1 more, or
    without theirs.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    our_parts: tuple[int, ...] = (1,)
    form: Form = "same"


def clip_to_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPModel's state dict under the names of a native model. Keys that no rule knows stay as they are."""
    return _converted(state, CLIP_RULES, to_ours=True)


def ours_to_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `clip_to_ours`."""
    return _converted(state, CLIP_RULES, to_ours=False)


def siglip_to_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A SiglipModel's state dict under the names of a timm SigLIP trunk and a text tower of its own."""
    return _converted(state, SIGLIP_RULES, to_ours=True)


def ours_to_siglip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `siglip_to_ours`."""
    return _converted(state, SIGLIP_RULES, to_ours=False)


def is_clip(state: dict[str, Tensor]) -> bool:
    """Whether these are the keys of a CLIPModel, or of one of its towers with its projection."""
    return "vision_model.embeddings.class_embedding" in state


def is_siglip(state: dict[str, Tensor]) -> bool:
    """Whether these are the keys of a SiglipModel, or of its image tower."""
    return "vision_model.head.probe" in state


def _linear(theirs: str, ours: str) -> list[Rule]:
    """A layer with a weight and a bias."""
    return [Rule((f"{theirs}.{leaf}",), (f"{ours}.{leaf}",)) for leaf in ("weight", "bias")]


def _query_key_value(theirs: str, ours_weight: str, ours_bias: str) -> list[Rule]:
    """Three layers of theirs that are one of ours."""
    return [
        Rule(tuple(f"{theirs}.{name}.{leaf}" for name in _QKV), (ours,))
        for leaf, ours in (("weight", ours_weight), ("bias", ours_bias))
    ]


def _native_blocks(theirs: str, ours: str) -> list[Rule]:
    theirs, ours = f"{theirs}.encoder.layers.*", f"{ours}transformer.resblocks.*"
    names = (
        ("layer_norm1", "ln_1"),
        ("layer_norm2", "ln_2"),
        ("self_attn.out_proj", "attn.out_proj"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    )
    rules = _query_key_value(f"{theirs}.self_attn", f"{ours}.attn.in_proj_weight", f"{ours}.attn.in_proj_bias")
    return rules + [rule for their, our in names for rule in _linear(f"{theirs}.{their}", f"{ours}.{our}")]


def _timm_blocks(theirs: str, ours: str) -> list[Rule]:
    theirs, ours = f"{theirs}.encoder.layers.*", f"{ours}.blocks.*"
    names = (
        ("layer_norm1", "norm1"),
        ("layer_norm2", "norm2"),
        ("self_attn.out_proj", "attn.proj"),
        ("mlp.fc1", "mlp.fc1"),
        ("mlp.fc2", "mlp.fc2"),
    )
    rules = _query_key_value(f"{theirs}.self_attn", f"{ours}.attn.qkv.weight", f"{ours}.attn.qkv.bias")
    return rules + [rule for their, our in names for rule in _linear(f"{theirs}.{their}", f"{ours}.{our}")]


def _text(ours: str) -> list[Rule]:
    return [
        Rule(("text_model.embeddings.token_embedding.weight",), (f"{ours}token_embedding.weight",)),
        Rule(("text_model.embeddings.position_embedding.weight",), (f"{ours}positional_embedding",)),
        *_native_blocks("text_model", ours),
        *_linear("text_model.final_layer_norm", f"{ours}ln_final"),
    ]


def _siglip_pool() -> list[Rule]:
    theirs, ours = "vision_model.head", "visual.trunk.attn_pool"
    stacked = [
        Rule((f"{theirs}.attention.in_proj_{leaf}",), (f"{ours}.q.{leaf}", f"{ours}.kv.{leaf}"), our_parts=(1, 2))
        for leaf in ("weight", "bias")
    ]
    names = (
        ("attention.out_proj", "proj"),
        ("layernorm", "norm"),
        ("mlp.fc1", "mlp.fc1"),
        ("mlp.fc2", "mlp.fc2"),
    )
    layers = [rule for their, our in names for rule in _linear(f"{theirs}.{their}", f"{ours}.{our}")]
    return [Rule((f"{theirs}.probe",), (f"{ours}.latent",)), *stacked, *layers]


CLIP_RULES: tuple[Rule, ...] = (
    Rule(("vision_model.embeddings.class_embedding",), ("visual.class_embedding",)),
    Rule(("vision_model.embeddings.patch_embedding.weight",), ("visual.conv1.weight",)),
    Rule(("vision_model.embeddings.position_embedding.weight",), ("visual.positional_embedding",)),
    # transformers' own spelling.
    *_linear("vision_model.pre_layrnorm", "visual.ln_pre"),
    *_native_blocks("vision_model", "visual."),
    *_linear("vision_model.post_layernorm", "visual.ln_post"),
    Rule(("visual_projection.weight",), ("visual.proj",), form="transposed"),
    *_text(""),
    Rule(("text_projection.weight",), ("text_projection",), form="transposed"),
)

SIGLIP_RULES: tuple[Rule, ...] = (
    *_linear("vision_model.embeddings.patch_embedding", "visual.trunk.patch_embed.proj"),
    Rule(("vision_model.embeddings.position_embedding.weight",), ("visual.trunk.pos_embed",), form="batched"),
    *_timm_blocks("vision_model", "visual.trunk"),
    *_linear("vision_model.post_layernorm", "visual.trunk.norm"),
    *_siglip_pool(),
    *_text("text."),
    *_linear("text_model.head", "text.text_projection"),
    Rule(("logit_scale",), ("logit_scale",), form="scalar"),
    Rule(("logit_bias",), ("logit_bias",), form="scalar"),
)


def _converted(state: dict[str, Tensor], rules: tuple[Rule, ...], to_ours: bool) -> dict[str, Tensor]:
    """A rule whose tensors are not all there does nothing, so that what is missing shows under its own name."""
    left = dict(state)
    converted: dict[str, Tensor] = {}
    for rule in rules:
        sources, targets = (rule.theirs, rule.ours) if to_ours else (rule.ours, rule.theirs)
        for number in _layer_numbers(left, sources[0]):
            names = [source.replace("*", number) for source in sources]
            if not all(name in left for name in names):
                continue
            tensors = _recut([left.pop(name) for name in names], rule, to_ours)
            converted |= {target.replace("*", number): part for target, part in zip(targets, tensors, strict=True)}
    return converted | left


def _layer_numbers(state: dict[str, Tensor], pattern: str) -> Iterator[str]:
    if "*" not in pattern:
        return iter([""])
    name = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))
    return iter([match[1] for key in state if (match := name.fullmatch(key))])


def _recut(tensors: list[Tensor], rule: Rule, to_ours: bool) -> list[Tensor]:
    whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    parts = rule.our_parts if to_ours else (1,) * len(rule.theirs)
    if len(parts) > 1:
        unit = len(whole) // sum(parts)
        return [part.contiguous() for part in whole.split([part * unit for part in parts])]
    return [_reshaped(whole, rule.form, to_ours)]


def _reshaped(tensor: Tensor, form: Form, to_ours: bool) -> Tensor:
    if form == "transposed":
        return tensor.T.contiguous()
    if form == "scalar":
        return tensor.reshape(() if to_ours else (1,))
    if form == "batched":
        return tensor[None] if to_ours else tensor[0]
    return tensor
