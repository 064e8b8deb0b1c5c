"""Weights into a model: reads any source, adapts what others store differently, resizes positions, loads strictly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.clip import CLIP
from models.errors import CheckpointError
from models.fitting import Difference, compare, first, models_that_fit
from models.from_transformers import from_transformers
from models.origin import OPENAI_TENSORS, Origin, find_origin
from models.positions import Resized, resize_positions
from models.weight_files import read_beside, read_weights_and_notes

_TEXT_ROOTS = ("positional_embedding", "text_projection", "token_embedding", "transformer", "ln_final")
# Bookkeeping, not weights: OpenAI's archives and older transformers releases store these as tensors.
_IGNORED = (*OPENAI_TENSORS, "text.transformer.embeddings.position_ids")


@dataclass(frozen=True)
class PretrainedReport:
    """What `load_pretrained` did; its text is for the log."""

    source: str
    num_tensors: int
    resized: tuple[Resized, ...]
    converted: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"loaded {self.num_tensors} tensors from {self.source}"]
        lines += [f"  converted: {note}" for note in self.converted]
        lines += [f"  resized: {resized}" for resized in self.resized] or ["  resized: nothing"]
        return "\n".join(lines)


def load_pretrained(model: CLIP, source: str) -> PretrainedReport:
    """Loads the weights at `source` into `model`, in the model's own precision, and reports what was adapted.

    `source` is a checkpoint folder, a folder of OpenCLIP's or transformers' form, a .safetensors file, or a .pt
    (OpenCLIP's training checkpoint or a bare state dict), as a path or any fsspec URL. Positions are resized to the
    model's image size and context length; everything else must fit exactly. Raises CheckpointError with the first
    differences otherwise, and where the origin of the weights shows that this model would compute something else.
    """
    raw, notes = read_weights_and_notes(source)
    origin = find_origin(raw, lambda name: read_beside(source, name))
    raw, renamed = from_transformers(raw)
    state, adapted = _adapt(model, raw)
    try:
        resized = resize_positions(model, state, origin.image_size)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    if difference := compare(model, state):
        raise CheckpointError(_mismatch(model, source, difference, raw, origin))
    _check_meaning(model, source, state, origin)
    model.load_state_dict(state, strict=True)
    return PretrainedReport(source, len(state), tuple(resized), tuple(notes + renamed + adapted))


def _check_meaning(model: CLIP, source: str, state: dict[str, Tensor], origin: Origin) -> None:
    """Weights of the right shapes can still be the wrong ones."""
    _check_origin(model, source, origin)
    for key, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise CheckpointError(f"{source}: {key} has values that are no finite numbers; the file is damaged")


def _check_origin(model: CLIP, source: str, origin: Origin) -> None:
    for reason in origin.contradictions(model.config):
        raise CheckpointError(
            f"{source} does not fit model {model.config.name or 'given'}: {reason} ({origin.evidence})"
        )


def read_fitting(model: CLIP, source: str) -> dict[str, Tensor]:
    """The weights at `source` under the names of `model`, which may be on the meta device; nothing is resized.

    Raises CheckpointError with the first differences when keys or shapes are not the model's, and where their origin
    shows that this model would compute something else. The values are not looked at.
    """
    raw, _ = read_weights_and_notes(source)
    origin = find_origin(raw, lambda name: read_beside(source, name))
    raw, _ = from_transformers(raw)
    state, _ = _adapt(model, raw)
    if difference := compare(model, state):
        raise CheckpointError(_mismatch(model, source, difference, raw, origin))
    _check_origin(model, source, origin)
    return state


def _adapt(model: CLIP, raw: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Renames and reshapes what OpenCLIP's releases store differently; the values stay."""
    state = {key: value for key, value in raw.items() if key not in _IGNORED}
    notes = [f"left out {key}" for key in _IGNORED if key in raw]
    state, layout_notes = _adapt_text_layout(state, model.config.custom_text)
    notes += layout_notes
    for key in ("logit_scale", "logit_bias"):
        if key in state and state[key].numel() == 1 and state[key].ndim:
            state[key] = state[key].reshape(())
            notes.append(f"made {key} a scalar")
    if model.logit_bias is not None and "logit_bias" not in state and "logit_scale" in state:
        state["logit_bias"] = torch.zeros_like(state["logit_scale"])
        notes.append("added logit_bias 0")
    return state, notes


def _adapt_text_layout(state: dict[str, Tensor], custom_text: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Between OpenCLIP's two layouts: text parameters at the top level, or under `text.`."""
    if custom_text and "positional_embedding" in state:
        moved = {f"text.{key}" if key.split(".")[0] in _TEXT_ROOTS else key: value for key, value in state.items()}
        return moved, ["text keys moved under text."]
    if not custom_text and "text.positional_embedding" in state:
        return {key.removeprefix("text."): value for key, value in state.items()}, ["text keys unpacked"]
    return state, []


def _mismatch(model: CLIP, source: str, difference: Difference, raw: dict[str, Tensor], origin: Origin) -> str:
    fitting = models_that_fit(raw, lambda other, weights: _adapt(other, weights)[0], origin.quick_gelu)
    advice = f"; it fits {first(fitting).replace(', ', ' or ')}" if fitting else ""
    return f"{source} does not fit model {model.config.name or 'given'}: {difference}{advice}"
