"""The learning rate as a pure function of the step.

Formulas as OpenCLIP's `scheduler.py`, so that its hyper-parameters keep their meaning: linear warm-up over
(step + 1) / warmup, then a half cosine to zero, a constant, or a constant with a polynomial cooldown.
"""

from __future__ import annotations

import math

from training.config import OptimConfig
from training.plan import Plan


def learning_rate(optim: OptimConfig, plan: Plan, step: int) -> float:
    """The rate of the update that takes `step` completed steps to `step` + 1."""
    if optim.skip_scheduler:
        return optim.lr
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    if optim.lr_scheduler == "cosine":
        span = max(1, plan.total_steps - optim.warmup)
        return 0.5 * (1 + math.cos(math.pi * (step - optim.warmup) / span)) * optim.lr
    if optim.lr_scheduler == "const-cooldown":
        return _cooldown(optim, plan, step)
    return optim.lr


def _cooldown(optim: OptimConfig, plan: Plan, step: int) -> float:
    assert optim.epochs_cooldown is not None
    start = plan.total_steps - plan.steps_per_epoch * optim.epochs_cooldown
    if step < start:
        return optim.lr
    left = 1 - (step - start) / (plan.total_steps - start)
    return left**optim.lr_cooldown_power * (optim.lr - optim.lr_cooldown_end) + optim.lr_cooldown_end
