"""What the towers take: counted without memory as it would be with it."""

from __future__ import annotations

import pytest
import torch

import models
from training.footprint import Footprint
from training.forecast import measure_costs
from training.precision import autocast


def really_run(model: models.CLIP, rows: int, precision: str) -> int:
    """The most bytes that live beside weights and gradients, in a pass over real tensors."""
    config = model.config
    images = torch.randn(rows, 3, *model.visual.image_size)
    tokens = torch.ones(rows, config.text_cfg.context_length, dtype=torch.int64)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Footprint() as footprint:
        with autocast(precision, torch.device("cpu")):
            outputs = [output for output in model(images, tokens) if output is not None]
        torch.stack([output.float().mean() for output in outputs]).sum().backward()
    return footprint.peak_bytes


@pytest.mark.parametrize("name", ["tiny-test", "tiny-test-rn", "tiny-test-timm", "tiny-test-coca"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_memory_is_counted_without_memory_as_with_it(name: str, checkpointing: bool, precision: str) -> None:
    config = models.load_model_config(name)
    counted = measure_costs(config, 4, precision, checkpointing, config.text_cfg.context_length)
    model = models.build_model(config).train()
    model.set_grad_checkpointing(checkpointing)
    assert counted.activation_bytes == pytest.approx(really_run(model, 4, precision), rel=0.02)
    assert counted.num_parameters == sum(p.numel() for p in model.parameters())


def test_recomputation_saves_memory_and_no_work_is_counted_for_it() -> None:
    config = models.load_model_config("ViT-B-32")
    plain, recomputed = (measure_costs(config, 64, "amp_bf16", checkpointing, 77) for checkpointing in (False, True))
    assert recomputed.activation_bytes < 0.5 * plain.activation_bytes
    assert recomputed.sample_flops == plain.sample_flops


def test_shorter_captions_cost_less_work_and_the_memory_of_the_longest() -> None:
    config = models.load_model_config("ViT-B-32")
    full, short = (measure_costs(config, 8, "amp_bf16", False, tokens) for tokens in (77, 20))
    assert short.sample_flops < 0.8 * full.sample_flops
    assert short.activation_bytes == full.activation_bytes
