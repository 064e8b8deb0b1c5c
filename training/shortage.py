"""Memory that does not suffice and compilers that fail, as one line that names what was tried and what to lower.

Knows the settings that decide on memory, and how torch words such errors; knows no step.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from training.config import TrainConfig
from training.errors import ConfigError, OutOfMemoryError, PeerError, UserError, first_line

log = logging.getLogger(__name__)

# Of torch's CPU allocator, CUDA's runtime and its libraries; torch gives them no class of their own.
_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory: you tried to allocate",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
_COMPILERS = ("torch._dynamo", "torch._inductor", "torch._functorch", "triton")


@dataclass(frozen=True)
class Load:
    """What a step has to hold: `state_bytes` of weights, gradients and optimiser on a rank; `device_bytes` in all."""

    config: TrainConfig
    world_size: int
    image_size: tuple[int, int]
    context_length: int
    state_bytes: int = 0
    device_bytes: int | None = None  # where it is known

    def __str__(self) -> str:
        optim, (height, width) = self.config.optim, self.image_size
        accumulated = f" x {optim.accum_freq} accumulated" if optim.accum_freq > 1 else ""
        return (
            f"--batch-size {optim.batch_size}{accumulated}, images of {height} x {width}, texts of "
            f"{self.context_length} tokens, {self.config.model.precision}"
        )


@contextmanager
def explained(load: Load, *, in_training: bool = False) -> Iterator[None]:
    """Raises OutOfMemoryError for memory that does not suffice, and before the training ConfigError for compilers that
    fail.
    """
    try:
        yield
    except (*UserError, PeerError):
        raise  # these have their words
    except (RuntimeError, MemoryError) as error:
        line = _explain(error, load, in_training)
        if line is None:
            raise
        log.info("where it happened:", exc_info=True, extra={"file_only": True})
        raise (OutOfMemoryError if _memory_error(error) else ConfigError)(line) from error


def _explain(error: BaseException, load: Load, in_training: bool) -> str | None:
    if cause := _memory_error(error):
        said, cures = _shortened(cause), "; or ".join(remedies(load, str(cause)))
        if in_training:
            return (
                f"out of memory in training ({said}) with {load}. The last checkpoint is intact: go on from it by "
                f"--resume latest with {cures}"
            )
        return f"out of memory in the trial step ({said}) with {load}. Lower what it takes: {cures}"
    if not in_training and (cause := _compile_error(error)):
        return (
            f"--torchcompile: the compiler failed in the trial step: {type(cause).__name__}: {first_line(cause)} "
            f"(with {load}). Leave out --torchcompile; train.log has where it happened"
        )
    return None


def remedies(load: Load, said: str = "") -> list[str]:
    """What to change, the most helpful first; `said`: torch's words, which tell of fragments."""
    config = load.config
    found = []
    if not config.model.grad_checkpointing:
        found.append("--grad-checkpointing (computes a third more)")
    found += _smaller_batch(config)
    if config.model.precision == "fp32" and load.device_bytes is not None:
        found.append("--precision amp_bf16")
    if sharding := _sharding(load):
        # Where weights and optimiser fill the device, no batch is small enough.
        dominates = load.device_bytes is not None and load.state_bytes > load.device_bytes / 2
        found.insert(0 if dominates else len(found), sharding)
    if fragments := re.search(r"([\d.]+ GiB) is reserved by PyTorch but unallocated", said):
        found.append(f"PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True exported ({fragments[1]} lie in fragments)")
    return found or ["a smaller --model, or --force-image-size"]


def _smaller_batch(config: TrainConfig) -> list[str]:
    """The same global batch in smaller pieces."""
    rows = config.optim.batch_size
    pieces = next((n for n in range(2, rows + 1) if rows % n == 0), None)
    if pieces is None:
        return []
    without = " --no-ddp-static-graph" if config.cluster.ddp_static_graph else ""
    accumulated = config.optim.accum_freq * pieces
    return [f"--batch-size {rows // pieces} --accum-freq {accumulated}{without} (the same global batch)"]


def _sharding(load: Load) -> str:
    cluster = load.config.cluster
    if load.world_size == 1 or cluster.fsdp:
        return ""
    without = " --no-ddp-static-graph" if cluster.ddp_static_graph else ""
    without += " --no-channels-last" if cluster.channels_last else ""
    return f"--fsdp{without} (weights and optimiser over {load.world_size} ranks)"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it: compilers wrap what they meet."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _memory_error(error: BaseException) -> BaseException | None:
    for link in _chain(error):
        if isinstance(link, (MemoryError, torch.OutOfMemoryError)):
            return link
        if isinstance(link, RuntimeError) and any(words in str(link) for words in _NO_MEMORY):
            return link
    return None


def _compile_error(error: BaseException) -> BaseException | None:
    for link in _chain(error):
        if any(kind.__module__.startswith(_COMPILERS) for kind in type(link).__mro__):
            return link
    return None


def _shortened(error: BaseException) -> str:
    """What was asked for, and what there is; not torch's advice."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text[max(0, text.find("DefaultCPUAllocator")) :]
    return ". ".join(text.split(". ")[:3]).rstrip(".")[:300]
