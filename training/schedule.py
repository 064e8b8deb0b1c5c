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
    if step < plan.warmup_steps:
        return optim.lr * (step + 1) / plan.warmup_steps
    if optim.lr_scheduler == "cosine":
        span = max(1, plan.total_steps - plan.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * (step - plan.warmup_steps) / span)) * optim.lr
    if optim.lr_scheduler == "const-cooldown":
        return _cooldown(optim, plan, step)
    return optim.lr


def _cooldown(optim: OptimConfig, plan: Plan, step: int) -> float:
    start = cooldown_start(optim, plan)
    if step < start:
        return optim.lr
    left = 1 - (step - start) / (plan.total_steps - start)
    return left**optim.lr_cooldown_power * (optim.lr - optim.lr_cooldown_end) + optim.lr_cooldown_end


def cooldown_start(optim: OptimConfig, plan: Plan) -> int:
    """Completed steps from which on const-cooldown falls."""
    assert optim.epochs_cooldown is not None
    return plan.total_steps - plan.steps_per_epoch * optim.epochs_cooldown


def describe_schedule(optim: OptimConfig, plan: Plan) -> str:
    """The whole schedule in one line."""
    if optim.skip_scheduler:
        return f"{optim.lr:g} throughout"
    warmup, total = plan.warmup_steps, plan.total_steps
    parts = [f"to {optim.lr:g} in {warmup} steps ({warmup * plan.global_batch} samples)" if warmup else f"{optim.lr:g}"]
    if warmup >= total:
        parts[0] += f", which is longer than the run's {total} steps"
    elif optim.lr_scheduler == "cosine":
        parts.append(f"as a half cosine to 0 at step {total}")
    elif optim.lr_scheduler == "const-cooldown":
        start, power = cooldown_start(optim, plan), optim.lr_cooldown_power
        parts.append(f"constant to step {start}")
        parts.append(f"down to {optim.lr_cooldown_end:g} at step {total} (power {power:g})")
    else:
        parts.append(f"constant to step {total}")
    return ", then ".join(parts)


def describe_change(before: tuple[OptimConfig, Plan], now: tuple[OptimConfig, Plan], samples_seen: int) -> str:
    """What is different for a run of which `samples_seen` are behind it; empty where nothing is."""
    (old_optim, old), (optim, plan) = before, now
    old_step, step = samples_seen // old.global_batch, samples_seen // plan.global_batch
    figures: list[tuple[str, float, float]] = [
        ("global batch", old.global_batch, plan.global_batch),
        ("steps an epoch", old.steps_per_epoch, plan.steps_per_epoch),
        ("steps in all", old.total_steps, plan.total_steps),
        ("this step", old_step, step),
        ("samples of warm-up", old.warmup_steps * old.global_batch, plan.warmup_steps * plan.global_batch),
        ("learning rate here", learning_rate(old_optim, old, old_step), learning_rate(optim, plan, step)),
    ]
    return ", ".join(f"{name} {a:.10g} -> {b:.10g}" for name, a, b in figures if f"{a:.6g}" != f"{b:.6g}")
