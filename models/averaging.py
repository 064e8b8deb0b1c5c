"""The weighted mean of many models' weights (Wortsman et al. 2022, Model soups; the same year, WiSE-FT).

Owns the arithmetic and the streaming: from each file comes one piece at a time, so that any number of models of
any size is averaged in the memory of a few tensors. Knows nothing of scores, of runs, or of who chose the members.

Sums are in fp64 and rounded once: a mean of copies is the copy, bit for bit. The temperature is stored as its
logarithm and averaged as that, like any parameter. Whole numbers (of batches seen) are the first member's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.clip import CLIP
from models.config import ModelConfig
from models.errors import CheckpointError, ConfigError
from models.factory import build_model
from models.weight_files import is_mapped
from models.weight_writer import TensorSpec, in_file_order, write_safetensors
from models.weights import read_fitting

# Elements that are summed at a time, of however many tensors: for each such piece every file is opened anew.
PIECE_ELEMENTS = 2**23
# Elements in one operation, few enough that its operands stay in the processor's cache.
_CACHED_ELEMENTS = 2**18
# What may differ between models that are averaged: what shapes show anyway, and what training alone uses.
_MAY_DIFFER = (
    "name",
    "vision_cfg.image_size",
    "preprocess_cfg.size",
    "vision_cfg.patch_dropout",
    "vision_cfg.timm_drop",
    "vision_cfg.timm_drop_path",
    "vision_cfg.timm_model_pretrained",
    "text_cfg.hf_model_pretrained",
    "init_logit_scale",
    "init_logit_bias",
)


@dataclass(frozen=True)
class Member:
    """One model of an average: where its weights are, and how much they count beside the others'."""

    source: str
    weight: float = 1.0


@dataclass(frozen=True)
class _Span:
    """Elements `start` to `stop` of a flattened tensor."""

    key: str
    start: int
    stop: int


class Average:
    """The mean of `members`, each with weight / (sum of weights), as a model of `config`.

    Construction looks at every member's header. Raises CheckpointError for weights that are not those of such a
    model, none resized: that comes before the mean.
    """

    def __init__(self, config: ModelConfig, members: Sequence[Member], piece_elements: int = PIECE_ELEMENTS) -> None:
        with torch.device("meta"):
            model = build_model(config)
        self._sources = [_Source(model, member) for member in members]
        self._piece_elements = piece_elements
        self.specs = in_file_order(_common_specs([source.read() for source in self._sources]))

    @property
    def has_running_statistics(self) -> bool:
        """Whether statistics of batch norms are averaged too: they are not those that the mean would have."""
        return any(key.endswith(".running_mean") for key in self.specs)

    def write(self, path: Path) -> None:
        """The mean as a safetensors file. Raises CheckpointError for values that are not finite, and OSError."""
        write_safetensors(path, self.specs, (values for _, values in self._pieces()))

    def load_into(self, model: CLIP) -> None:
        """The mean as the weights of `model`, on its device. Raises CheckpointError for values that are not finite."""
        state = model.state_dict()
        for span, values in self._pieces():
            state[span.key].view(-1)[span.start : span.stop] = values.to(state[span.key].device)

    def _pieces(self) -> Iterator[tuple[_Span, Tensor]]:
        """Flat pieces of the mean in the order of `specs`."""
        for spans in _batches(self.specs, self._piece_elements):
            yield from zip(spans, self._means(spans), strict=True)

    def _means(self, spans: list[_Span]) -> list[Tensor]:
        sums = [torch.zeros(span.stop - span.start, dtype=torch.float64) for span in spans]
        for source in self._sources:
            if source.weight != 0:
                source.add_to(sums, spans)
        total = sum(source.weight for source in self._sources)
        return [self._rounded(span, added.div_(total)) for span, added in zip(spans, sums, strict=True)]

    def _rounded(self, span: _Span, mean: Tensor) -> Tensor:
        dtype = self.specs[span.key].dtype
        return mean.to(dtype) if dtype.is_floating_point else _part(self._sources[0].read(), span).clone()


class _Source:
    """A member's file. It is mapped anew at each read: pages that were read count as memory while a mapping lasts."""

    def __init__(self, model: CLIP, member: Member) -> None:
        self.weight = member.weight
        self._model, self._source = model, member.source
        # What is not on this disk, or cannot be mapped, is read once and held.
        self._held = None if is_mapped(member.source) else read_fitting(model, member.source)

    def read(self) -> dict[str, Tensor]:
        return read_fitting(self._model, self._source) if self._held is None else self._held

    def add_to(self, sums: list[Tensor], spans: list[_Span]) -> None:
        state = self.read()
        for added, span in zip(sums, spans, strict=True):
            parts = _part(state, span).split(_CACHED_ELEMENTS)
            for into, part in zip(added.split(_CACHED_ELEMENTS), parts, strict=True):
                if not part.isfinite().all():
                    raise CheckpointError(f"{self._source}: {span.key} has values that are not finite")
                into.add_(part, alpha=self.weight)


def _part(state: Mapping[str, Tensor], span: _Span) -> Tensor:
    return state[span.key].reshape(-1)[span.start : span.stop]


def _common_specs(states: list[dict[str, Tensor]]) -> dict[str, TensorSpec]:
    """Types wide enough for every member's; keys and shapes are one model's already."""
    return {
        key: TensorSpec(reduce(torch.promote_types, [state[key].dtype for state in states]), tuple(tensor.shape))
        for key, tensor in states[0].items()
    }


def _batches(specs: Mapping[str, TensorSpec], most: int) -> Iterator[list[_Span]]:
    """All elements of all tensors in order, `most` at a time; a large tensor is cut, small ones go together."""
    batch: list[_Span] = []
    room = most
    for key, spec in specs.items():
        start = 0
        while start < spec.num_elements:
            stop = min(spec.num_elements, start + room)
            batch.append(_Span(key, start, stop))
            room, start = room - (stop - start), stop
            if room == 0:
                yield batch
                batch, room = [], most
    if batch:
        yield batch


def common_config(configs: Mapping[str, ModelConfig]) -> tuple[ModelConfig, list[str]]:
    """The first of the configurations, and a line for each of the others that has another image size.

    configs: by the source that each belongs to. Raises ConfigError where two would compute different things from
    equal weights.
    """
    (first_source, first), *others = configs.items()
    notes = []
    for source, config in others:
        ours, theirs = _computing(first), _computing(config)
        if wrong := [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]:
            shown = ", ".join(f"{key} is {ours.get(key)} and {theirs.get(key)}" for key in wrong[:5])
            raise ConfigError(f"{first_source} and {source} are different models: {shown}")
        sizes = first.vision_cfg.image_size, config.vision_cfg.image_size
        if sizes[0] != sizes[1]:
            notes.append(f"image size {sizes[1]} of {source} gives way to {sizes[0]} of {first_source}")
    return first, notes


def _computing(config: ModelConfig) -> dict[str, Any]:
    """The settings that change what equal weights compute, by dotted path."""
    settings = {key: value for key, value in _flat(config.to_dict()).items() if key not in _MAY_DIFFER}
    # Where it begins does not matter, but whether there is one: files without are read as if theirs were 0.
    return {**settings, "logit_bias": config.init_logit_bias is not None}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
