"""The arithmetic of the towers, and the scale of fp16 losses. Knows no model and no optimiser.

Parameters are fp32 under every setting; normalisation, logits and loss leave autocast by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

_AUTOCAST = {"amp": torch.float16, "amp_bf16": torch.bfloat16, "amp_bfloat16": torch.bfloat16}

# Those of torch.amp.GradScaler: start, factor, and finite steps between two growths.
_INITIAL_SCALE = 2.0**16
_FACTOR = 2.0
_GROWTH_INTERVAL = 2000


def autocast_dtype(precision: str) -> torch.dtype | None:
    """What matrix products and convolutions compute in; None where they stay fp32."""
    return _AUTOCAST.get(precision)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """The arithmetic of the towers, as a context around their forward pass."""
    dtype = autocast_dtype(precision)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


class LossScale:
    """A factor that keeps fp16 gradients from vanishing: halved when they overflow, doubled after a long calm.

    The rule is that of Micikevicius et al. 2018, "Mixed precision training", section 3.2. It lives on the device,
    and `update` takes the decision that all ranks share, so no rank's factor can differ and nothing waits.
    """

    def __init__(self, device: torch.device):
        self.value = torch.full((), _INITIAL_SCALE, device=device)
        self._calm_steps = torch.zeros((), device=device)

    def update(self, overflowed: Tensor) -> None:
        """`overflowed`: 0-D bool, the same on all ranks."""
        calm = self._calm_steps + 1
        grows = calm >= _GROWTH_INTERVAL
        grown = torch.where(grows, self.value * _FACTOR, self.value)
        self._calm_steps = torch.where(overflowed | grows, torch.zeros_like(calm), calm)
        # Below one it would only add to what vanishes.
        self.value = torch.where(overflowed, (self.value / _FACTOR).clamp(min=1.0), grown)

    def may_shrink(self) -> Tensor:
        """0-D bool: an overflow may be the scale's fault, and the next step has a smaller one."""
        return self.value > 1

    def state_dict(self) -> dict[str, float]:
        """Numbers that JSON holds exactly: powers of two and small integers."""
        return {"scale": float(self.value), "calm_steps": float(self._calm_steps)}  # Host sync: at a save.

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.value.fill_(state["scale"])
        self._calm_steps.fill_(state["calm_steps"])


def build_loss_scale(precision: str, device: torch.device) -> LossScale | None:
    """A scale for fp16; bf16 has the range of fp32 and needs none."""
    return LossScale(device) if autocast_dtype(precision) is torch.float16 else None
