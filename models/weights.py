"""Weights into a model: reads any source, adapts OpenCLIP's variants, resizes positions, then loads strictly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.clip import CLIP
from models.config import ModelConfig
from models.errors import CheckpointError, ConfigError
from models.positions import Resized, position_keys, resize_positions
from models.registry import list_models, load_model_config
from models.weight_files import read_weights, read_weights_and_notes

_TEXT_ROOTS = ("positional_embedding", "text_projection", "token_embedding", "transformer", "ln_final")
# Bookkeeping, not weights: OpenAI's archives and older transformers releases store these as tensors.
_IGNORED = ("input_resolution", "context_length", "vocab_size", "text.transformer.embeddings.position_ids")
_NUM_SHOWN = 5


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


@dataclass(frozen=True)
class _Difference:
    """How a state dict differs from a model: keys, and (key, shape in the file, shape in the model)."""

    missing: list[str]
    unexpected: list[str]
    shapes: list[tuple[str, list[int], list[int]]]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def __str__(self) -> str:
        shapes = [f"{key} {old} in the file, {new} in the model" for key, old, new in self.shapes]
        parts = [("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", shapes)]
        return "; ".join(f"{len(items)} {what}: {_first(items)}" for what, items in parts if items)


def load_pretrained(model: CLIP, source: str) -> PretrainedReport:
    """Loads the weights at `source` into `model`, in the model's own precision, and reports what was adapted.

    `source` is a checkpoint folder, a .safetensors file, or an OpenCLIP .pt (training checkpoint or bare state
    dict), as a path or any fsspec URL. Positions are resized to the model's image size and context length;
    everything else must fit exactly. Raises CheckpointError with the first differences otherwise.
    """
    raw, notes = read_weights_and_notes(source)
    state, more_notes = _adapt(model, raw)
    try:
        resized = resize_positions(model, state)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    difference = _compare(model, state)
    if difference:
        raise CheckpointError(_mismatch(model.config, source, difference, raw))
    model.load_state_dict(state, strict=True)
    return PretrainedReport(source, len(state), tuple(resized), tuple(notes + more_notes))


def read_fitting(model: CLIP, source: str) -> dict[str, Tensor]:
    """The weights at `source` under the names of `model`, which may be on the meta device; nothing is resized.

    Raises CheckpointError with the first differences when keys or shapes are not the model's.
    """
    raw = read_weights(source)
    state, _ = _adapt(model, raw)
    difference = _compare(model, state)
    if difference:
        raise CheckpointError(_mismatch(model.config, source, difference, raw))
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


def _compare(model: CLIP, state: dict[str, Tensor], ignored: tuple[str, ...] = ()) -> _Difference:
    own = {key: list(value.shape) for key, value in model.state_dict().items()}
    shapes = [
        (key, list(state[key].shape), shape)
        for key, shape in own.items()
        if key in state and list(state[key].shape) != shape and key not in ignored
    ]
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    return _Difference(missing, unexpected, shapes)


def _mismatch(config: ModelConfig, source: str, difference: _Difference, raw: dict[str, Tensor]) -> str:
    fitting = _models_that_fit(raw)
    advice = f"; it fits {' or '.join(fitting)}" if fitting else ""
    return f"{source} does not fit model {config.name or 'given'}: {difference}{advice}"


def _models_that_fit(raw: dict[str, Tensor]) -> list[str]:
    """Names of registered models that these weights belong to, up to image size and context length."""
    return [name for name in list_models() if _fits(load_model_config(name), raw)]


def _fits(config: ModelConfig, raw: dict[str, Tensor]) -> bool:
    table = raw.get("token_embedding.weight", raw.get("text.token_embedding.weight"))
    if table is None or tuple(table.shape) != (config.text_cfg.vocab_size, config.text_cfg.width):
        return False  # cheaper than building the towers
    try:
        with torch.device("meta"):
            model = CLIP(config)
    except ConfigError:
        return False
    state, _ = _adapt(model, raw)
    return not _compare(model, state, ignored=tuple(position_keys(model)))


def _first(items: list[str]) -> str:
    return ", ".join(items[:_NUM_SHOWN]) + (", ..." if len(items) > _NUM_SHOWN else "")
