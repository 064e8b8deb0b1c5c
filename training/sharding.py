"""FSDP2: parameters, gradients and optimiser state as shards by rows; from shards to whole tensors and back.

Knows `torch.distributed.fsdp` and DTensors; knows no step, no file and no loss.

Each block of the towers is a group that is gathered and reduced by itself, what is left of the model another.
Masters are fp32 shards and gradients are reduced in fp32 unless told otherwise. Under bf16 autocast a block is
gathered in bf16: autocast would round its matrices so in any case, the bytes are half, and the backward pass
keeps no whole copy. What lies outside of the blocks (embeddings, positions, heads) is gathered in fp32.
Parameters without dimensions, the temperature and the bias of the logits, cannot be sharded by rows: every rank
keeps them whole, and the update reduces their gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from models import CLIP
from training.distributed import World

__all__ = [
    "FSDPModule",
    "WholeTensors",
    "broadcast_from_main",
    "copy_rows",
    "gathering",
    "is_sharded",
    "local",
    "reshard",
    "shard",
    "without_reduction",
]


def shard(
    model: CLIP,
    world: World,
    *,
    reshard_after_forward: bool,
    gather_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype,
) -> None:
    """Turn the parameters of `model` into shards, in place, with rank 0's values. Collective.

    gather_dtype: what blocks compute with, which then wants autocast of that type around every forward pass; None
    is the parameters' own. Blocks with a batch norm keep theirs, since its kernels want parameters and running
    statistics in one type.
    """
    broadcast_from_main(model)
    mesh = init_device_mesh(world.device.type, (world.size,))  # Collective:
    whole = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    own = MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    low = MixedPrecisionPolicy(param_dtype=gather_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for block in model.blocks():
        policy = own if has_batch_norm(block) else low
        fully_shard(
            block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward, ignored_params=whole
        )
    # The backward pass begins with these parameters: freeing them in between would gain nothing.
    fully_shard(model, mesh=mesh, mp_policy=own, reshard_after_forward=False, ignored_params=whole)
    if world.backend == "gloo":
        # Where it is asked for a mean, gloo gives the sum, without a word, under torch 2.8.
        for module in _sharded_modules(model):
            module.set_force_sum_reduction_for_comms(True)


def broadcast_from_main(model: nn.Module) -> None:
    """Rank 0's parameters and buffers on every rank, tensor by tensor. Collective."""
    for tensor in chain(model.parameters(), model.buffers()):
        dist.broadcast(tensor.detach(), src=0)  # Collective:


def has_batch_norm(model: nn.Module) -> bool:
    """True for towers whose forward pass in training mode changes running statistics."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@contextmanager
def without_reduction(model: FSDPModule) -> Iterator[None]:
    """Gradients of backward passes inside stay on this rank, whole, until a later one reduces their sum."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def reshard(model: nn.Module) -> None:
    """Shards again, where forward passes without a backward pass have left whole parameters. Not collective."""
    for module in _sharded_modules(model):
        module.reshard()


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_sharded(tensor: Tensor) -> bool:
    """True for a shard with the shape of the whole."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The rows of this rank; the tensor itself if it is not sharded. Shares memory."""
    return cast(DTensor, tensor.detach()).to_local() if isinstance(tensor, DTensor) else tensor


def copy_rows(target: Tensor, whole: Tensor) -> None:
    """Fill `target` with its rows of `whole`, of which nothing else is read. Not collective."""
    if isinstance(target, DTensor):
        whole = _own_rows(whole, target)
    local(target).copy_(whole)


def _own_rows(whole: Tensor, like: DTensor) -> Tensor:
    """The rows that FSDP2 gives this rank: those of `torch.chunk`, none where there are fewer chunks than ranks."""
    assert like.placements == (Shard(0),)
    chunks, rank = whole.chunk(like.device_mesh.size()), like.device_mesh.get_local_rank()
    return chunks[rank] if rank < len(chunks) else whole[:0]


class WholeTensors(Mapping[str, Tensor]):
    """Named tensors, whole when looked at: a lookup of a sharded one is a collective and leaves nothing behind."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors
        self._seen: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        self._seen.add(name)
        if not isinstance(tensor, DTensor):
            return tensor
        return cast(DTensor, tensor.detach()).full_tensor()  # Collective:

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def join(self) -> None:
        """Take part in the collectives of what was not looked at here, in the same order as everywhere."""
        for name in [name for name in self._tensors if name not in self._seen]:
            if isinstance(self._tensors[name], DTensor):
                self[name]


@contextmanager
def gathering(*states: Mapping[str, Tensor]) -> Iterator[tuple[WholeTensors, ...]]:
    """Whole tensors of `states` for a rank that goes through them once, in order; the others need do nothing.

    Collective. On leaving, ranks that have not gone through them, or not to the end, join what is missing.
    """
    whole = tuple(WholeTensors(state) for state in states)
    try:
        yield whole
    finally:
        for state in whole:
            state.join()
