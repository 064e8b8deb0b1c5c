"""From a model to what the step calls: activation checkpointing, then compilation, then DDP.

Order matters: blocks are checkpointed before they are compiled, and compiled inside the wrapper, so that DDP's
hooks stay outside every compiled graph and parameter names stay those of the plain model.
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

# Newer torch renamed the option and warns about the old name.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


def parallelize(model: CLIP, model_config: ModelConfig, cluster: ClusterConfig, world: World) -> nn.Module:
    """The module that the training step calls. `model` keeps its parameters and their names."""
    if model_config.grad_checkpointing:
        model.set_grad_checkpointing(True)
    if cluster.torchcompile:
        for block in model.blocks():
            block.compile()
    if world.size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=cluster.ddp_static_graph,
        # Only BatchNorm has buffers that training changes; everywhere else a broadcast would be wasted.
        **{_SYNC_BUFFERS: has_batch_norm(model)},  # type: ignore[arg-type]
    )


def unwrap(model: nn.Module) -> CLIP:
    """The plain model inside whatever `parallelize` put around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model  # type: ignore[return-value]


def without_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Gradients of backward passes inside stay on this rank, to be summed up by a later one outside."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def has_batch_norm(model: nn.Module) -> bool:
    """True for towers whose forward pass in training mode changes running statistics."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """The arithmetic of the towers. Parameters stay fp32; normalisation, logits and loss leave autocast themselves."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision.startswith("amp_bf"))
