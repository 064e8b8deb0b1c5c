"""What the towers take on one GPU, found by running them on tensors without memory.

The model of any size is built on the meta device and run forward and backward, as a step runs it, on fake tensors:
shapes and types are real, so the bytes alive at once are counted and not estimated, and nothing is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import models
from models.profile import profile_model
from training.footprint import Footprint, bytes_of
from training.precision import autocast


@dataclass(frozen=True)
class Costs:
    """weight_bytes: parameters and buffers; block_bytes: parameters of the largest repeated block.

    activation_bytes: the most that lives at once beside weights and gradients in a forward and backward pass of one
    micro-batch. sample_flops: of the forward pass of one pair, two for each multiplication with its addition.
    """

    num_parameters: int
    weight_bytes: int
    block_bytes: int
    activation_bytes: int
    sample_flops: int


def measure_costs(
    config: models.ModelConfig, micro_batch: int, precision: str, grad_checkpointing: bool, caption_tokens: int
) -> Costs:
    """The costs of a model and a micro-batch; FLOPs are those of texts of `caption_tokens`.

    Memory is that of texts that fill the context, which every run must be able to hold. Raises ConfigError for a model
    that cannot be built.
    """
    model = _without_memory(config)
    if grad_checkpointing:
        model.set_grad_checkpointing()
    counted = profile_model(models.config_with(config, context_length=caption_tokens))
    return Costs(
        num_parameters=sum(p.numel() for p in model.parameters()),
        weight_bytes=bytes_of(model.state_dict().values()),
        block_bytes=max((bytes_of(block.parameters()) for block in model.blocks()), default=0),
        activation_bytes=_activation_bytes(model, micro_batch, precision),
        sample_flops=2 * counted.total.macs,
    )


def _without_memory(config: models.ModelConfig) -> models.CLIP:
    with torch.device("meta"):
        return models.build_model(config).train()


def _activation_bytes(model: models.CLIP, micro_batch: int, precision: str) -> int:
    with FakeTensorMode():
        _fill_with_fakes(model)
        images = torch.empty(micro_batch, 3, *model.visual.image_size)
        tokens = torch.zeros(micro_batch, model.config.text_cfg.context_length, dtype=torch.int64)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)  # its memory is there from the first step on
        with Footprint() as footprint:
            # The processor's autocast casts what a GPU's does in these towers, and needs no GPU to be there.
            with autocast(precision, torch.device("cpu")):
                outputs = [output for output in model(images, tokens) if output is not None]
            torch.stack([output.float().mean() for output in outputs]).sum().backward()
    return footprint.peak_bytes


def _fill_with_fakes(model: nn.Module) -> None:
    """Puts tensors of the mode that is on in the place of the model's."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
