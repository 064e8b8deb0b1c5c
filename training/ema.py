"""The moving average of the weights (EMA): what it is after each step, and how it stands in for the weights.

Knows names and tensors, sharded ones too; knows no tower, no file and no evaluation.

The half-life is counted in samples (Karras et al. 2022, "Elucidating the design space of diffusion-based generative
models", appendix F.2): runs with other global batches give the same curve. Each rank keeps its own average of what
it holds. It needs no exchange then, and evaluation on all ranks finds it in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from training.sharding import copy_rows, local, reshard

# What a pass over the weights may hold for a moment.
_CHUNK_BYTES = 64 << 20

Pair = tuple[Tensor, Tensor]


def ema_weight(half_life: float, ramp_up: float | None, samples_seen: int, samples: int) -> float:
    """The share that the weights after a step of `samples` get in the average.

    ramp_up: the half-life is never longer than this share of the samples seen before the step, so that a run from
    scratch forgets where it began.
    """
    if ramp_up is not None:
        half_life = min(half_life, ramp_up * samples_seen)
    return 1.0 if half_life == 0 else 1 - 0.5 ** (samples / half_life)


class Ema:
    """The average of a model's trained weights, in their own precision; buffers are the model's last ones.

    It begins as the weights of now. What is not trained is the model's own tensor and takes no memory.
    """

    def __init__(self, model: nn.Module, half_life: float, ramp_up: float | None = None):
        self._model, self._half_life, self._ramp_up = model, half_life, ramp_up
        weights = model.state_dict()  # shares memory with the model
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        buffers = {name for name, _ in model.named_buffers()} & weights.keys()
        self._own = {name: weights[name].detach().clone() for name in weights if name in trained | buffers}
        self._state = {name: self._own.get(name, weight) for name, weight in weights.items()}
        self._trained = list(_chunks([(self._own[name], weights[name]) for name in weights if name in trained]))
        self._buffers = [(self._own[name], weights[name]) for name in weights if name in buffers]

    @property
    def num_bytes(self) -> int:
        """Memory of the average on this rank."""
        return sum(local(tensor).nbytes for tensor in self._own.values())

    def state(self) -> dict[str, Tensor]:
        """The average under the model's state-dict names, not copied; of a sharded model, shards."""
        return dict(self._state)

    @torch.no_grad()
    def update(self, left_out: Tensor, samples_seen: int, samples: int) -> None:
        """Take in the weights after a step of `samples`, unless `left_out` (0-D) is 1. Waits for nothing."""
        weight = (1 - left_out) * ema_weight(self._half_life, self._ramp_up, samples_seen, samples)
        for averages, weights in self._trained:
            way = torch._foreach_sub(weights, averages)
            torch._foreach_mul_(way, weight)
            torch._foreach_add_(averages, way)
        for average, buffer in self._buffers:
            average.copy_(torch.where(left_out.bool(), average, buffer))

    @torch.no_grad()
    def load(self, whole: Mapping[str, Tensor]) -> None:
        """Continue from an average that was saved, whole tensors under the same names. Not collective."""
        for name, tensor in self._own.items():
            copy_rows(tensor, whole[name])

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew, as the weights of now."""
        for averages, weights in self._trained:
            torch._foreach_copy_(averages, weights)
        for average, buffer in self._buffers:
            average.copy_(buffer)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Inside, the model computes with the average; afterwards its weights are bitwise as before."""
        reshard(self._model)
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        buffers = (([average], [buffer]) for average, buffer in self._buffers)
        for averages, weights in (*self._trained, *buffers):
            held = [weight.clone() for weight in weights]
            torch._foreach_copy_(weights, averages)
            torch._foreach_copy_(averages, held)


def _chunks(pairs: list[Pair]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """This rank's rows of (averages, weights), in chunks of a few tensors."""
    averages: list[Tensor] = []
    weights: list[Tensor] = []
    for average, weight in pairs:
        if averages and sum(tensor.nbytes for tensor in averages) + local(average).nbytes > _CHUNK_BYTES:
            yield averages, weights
            averages, weights = [], []
        averages.append(local(average))
        weights.append(local(weight))
    if averages:
        yield averages, weights
