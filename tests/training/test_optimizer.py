"""Which parameters decay, and with which constants."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.config import OptimConfig
from training.optimizer import adamw_settings, build_optimizer, is_decayed


@pytest.mark.parametrize(
    ("name", "shape", "decayed"),
    [
        ("visual.conv1.weight", (4, 3, 2, 2), True),
        ("transformer.resblocks.0.mlp.c_fc.weight", (8, 4), True),
        ("transformer.resblocks.0.mlp.c_fc.bias", (8,), False),
        ("ln_final.weight", (4,), False),
        ("logit_scale", (), False),
        ("positional_embedding", (77, 4), False),
    ],
)
def test_gains_biases_temperature_and_exempt_names_do_not_decay(
    name: str, shape: tuple[int, ...], decayed: bool
) -> None:
    assert is_decayed(name, torch.zeros(shape), {"positional_embedding"}) is decayed


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("ViT-H-14", (0.9, 0.98, 1e-6)),
        ("convnext_large_d", (0.9, 0.999, 1e-8)),
        ("coca_ViT-L-14", (0.9, 0.98, 1e-6)),
    ],
)
def test_constants_follow_the_model_family_unless_given(model: str, expected: tuple[float, ...]) -> None:
    assert adamw_settings(OptimConfig(), model) == expected
    assert adamw_settings(OptimConfig(beta2=0.95, eps=1e-3), model) == (0.9, 0.95, 1e-3)


def test_the_fused_update_leaves_everything_alone_where_found_inf_is_one() -> None:
    layer = nn.Linear(2, 2)
    optimizer = build_optimizer(layer, OptimConfig(lr=0.1), "x", ())
    layer(torch.ones(1, 2)).sum().backward()
    before = [p.clone() for p in layer.parameters()]
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), None
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
    assert all(float(state["step"]) == 0 for state in optimizer.state.values())
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
