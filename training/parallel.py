"""From a model to what the step calls: activation checkpointing, then compilation, then DDP or FSDP2.

Order matters: blocks are checkpointed before they are compiled, and compiled inside the wrapper, so that the
wrapper's hooks stay outside every compiled graph and parameter names stay those of the plain model. What goes
together is in `training.combinations`; nothing is checked here.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models import CLIP
from training.config import ClusterConfig, ModelConfig
from training.distributed import World
from training.precision import autocast_dtype
from training.sharding import FSDPModule, has_batch_norm, shard, without_reduction

# Newer torch renamed the option and warns about the old name.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)

_GRAPHS = 256


def parallelize(model: CLIP, model_config: ModelConfig, cluster: ClusterConfig, world: World) -> nn.Module:
    """The module that the training step calls. Parameters keep their names; sharded ones are other objects.

    Collective: every rank ends with rank 0's weights.
    """
    if cluster.channels_last:
        # Convolutions follow their weights: what goes in is converted once, at the first of them.
        model.visual.to(memory_format=torch.channels_last)
    if model_config.grad_checkpointing:
        model.set_grad_checkpointing(True)
    if cluster.torchcompile:
        _compile_blocks(model)
    if world.size == 1:
        return model
    return _fsdp(model, model_config, cluster, world) if cluster.fsdp else _ddp(model, cluster, world)


def _compile_blocks(model: CLIP) -> None:
    # All blocks of a class share one limit: two towers, a few text lengths, with and without gradient.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    for block in model.blocks():
        # The method, not the module: hooks of a wrapper around the block are not part of the graph. Static shapes:
        # with dynamic ones, recomputation may run another graph than the forward pass, and saves other tensors.
        block.forward = torch.compile(block.forward, dynamic=False)


def _ddp(model: CLIP, cluster: ClusterConfig, world: World) -> nn.Module:
    return DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=cluster.ddp_static_graph,
        # Only BatchNorm has buffers that training changes; everywhere else a broadcast would be wasted.
        **{_SYNC_BUFFERS: has_batch_norm(model)},  # type: ignore[arg-type]
    )


def _fsdp(model: CLIP, model_config: ModelConfig, cluster: ClusterConfig, world: World) -> nn.Module:
    # fp16 has too little range for weights; under it blocks are gathered as they are.
    in_bf16 = autocast_dtype(model_config.precision) is torch.bfloat16
    shard(
        model,
        world,
        reshard_after_forward=not cluster.fsdp_no_reshard_after_forward,
        gather_dtype=torch.bfloat16 if in_bf16 else None,
        reduce_dtype=torch.bfloat16 if cluster.grad_reduce_dtype == "bf16" else torch.float32,
    )
    return model


def unwrap(model: nn.Module) -> CLIP:
    """The plain model inside whatever `parallelize` put around it; FSDP's is the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model  # type: ignore[return-value]


def without_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Gradients of backward passes inside stay on this rank, to be summed up by a later one outside."""
    if isinstance(model, FSDPModule):
        return without_reduction(model)
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
