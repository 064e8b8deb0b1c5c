"""The update: what a loss scale changes, and what waits for the device. Nothing may, outside of logging."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import models
from data import AugmentConfig, Batch, DeviceTransform
from data.augment import draw_augmentations
from data.randomness import KeyedRandom
from training.config import OptimConfig
from training.distributed import World
from training.losses import Contrastive
from training.optimizer import build_optimizer
from training.precision import LossScale, build_loss_scale
from training.step import TrainStep
from training.update import StepResult

CPU = torch.device("cpu")
ROWS = 4
# Operations whose result, or its size, the host must know before it can go on.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "index.")


class HostSyncs(TorchDispatchMode):
    """Notes every operation that would wait for a GPU; on the CPU the same ones are called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        if name.startswith(WAITING) and not _is_plain_index(name, args):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def _is_plain_index(name: str, args: tuple) -> bool:
    """Indexing by integers has a known size; by a mask it has not."""
    return name.startswith("index.") and all(i is None or i.dtype != torch.bool for i in args[1])


def step_of(name: str, **changes: Any) -> TrainStep:
    torch.manual_seed(0)
    config = models.config_with(models.load_model_config(name), patch_dropout=0.5 if name == "tiny-test" else None)
    model = models.build_model(config)
    aug = AugmentConfig(color_jitter=(0.3, 0.3, 0.3, 0.1), color_jitter_prob=0.8, gray_scale_prob=0.2, re_prob=0.5)
    settings = {"precision": "fp32", "accum_steps": 1} | changes
    step = TrainStep(
        model=model,
        optimizer=build_optimizer(model, OptimConfig(), "vit", ()),
        transform=DeviceTransform((0.5,) * 3, (0.5,) * 3, aug),
        world=World(),
        seed=0,
        clip_grad_norm=1.0,
        objective=Contrastive(),
        cut_padding=True,
        loss_scale=build_loss_scale(settings["precision"], CPU),
        **settings,
    )
    # The optimiser's state exists from the second step on.
    step(batch_of(step), 0, 1e-3)
    return step


def draws_of(aug: AugmentConfig, side: int) -> dict[str, Tensor]:
    rows = [draw_augmentations(aug, (side, side), KeyedRandom(0, row)) for row in range(ROWS)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def batch_of(step: TrainStep) -> Batch:
    side = step.model.visual.image_size[0]
    tokens = torch.randint(1, 49405, (ROWS, 16))
    tokens[:, -1] = 49407
    images = torch.randint(0, 256, (ROWS, 3, side, side), dtype=torch.uint8)
    return Batch(images, tokens, draws_of(step.transform.aug, side), ["k"] * ROWS, ["s"] * ROWS)


def test_the_counter_sees_what_it_is_for() -> None:
    values = torch.arange(4.0)
    with HostSyncs() as syncs:
        float(values[0]), bool(values[1] > 0), values[values > 1], values.nonzero()
    assert len(syncs.found) >= 4


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tiny-test", {}),
        ("tiny-test", {"precision": "amp", "accum_steps": 2}),
        ("tiny-test-timm", {"precision": "amp_bf16"}),
        ("tiny-test-rn", {"accum_steps": 2}),
    ],
)
def test_a_step_waits_for_nothing(name: str, settings: dict[str, Any]) -> None:
    step = step_of(name, **settings)
    batch = batch_of(step)
    with HostSyncs() as syncs:
        step(batch, 1, 1e-3)
    assert syncs.found == []


def with_scale(value: float, pixels: float = 1.0) -> tuple[StepResult, dict[str, Tensor], LossScale]:
    """One step from the same weights under a loss scale; gradients overflow when the images are multiplied."""
    step = step_of("tiny-test")
    scale = LossScale(CPU)
    scale.load_state_dict({"scale": value, "calm_steps": 0.0})
    step.transform.scale.mul_(pixels)
    result = dataclasses.replace(step, loss_scale=scale)(batch_of(step), 1, 1e-3)
    return result, {name: p.detach().clone() for name, p in step.model.named_parameters()}, scale


def test_a_loss_scale_changes_neither_the_norm_nor_the_clipped_update() -> None:
    (one, plain, _), (two, scaled, _) = with_scale(1), with_scale(2.0**10)
    torch.testing.assert_close(one.grad_norm, two.grad_norm, rtol=1e-4, atol=0)
    for name, value in plain.items():
        torch.testing.assert_close(scaled[name], value, rtol=1e-4, atol=1e-6)


def test_an_overflow_is_reported_as_a_fault_only_when_the_scale_cannot_cure_it() -> None:
    result, _, scale = with_scale(2.0**127)
    assert (float(result.skipped), float(scale.value)) == (0.0, 2.0**126)
    for value in (1.0, 2.0**10):
        result, _, _ = with_scale(value, pixels=float("nan"))
        assert float(result.skipped) == 1.0
