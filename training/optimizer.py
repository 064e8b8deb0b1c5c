"""AdamW and its two parameter groups. Knows names and shapes of parameters, nothing of their owners."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from training.config import OptimConfig


def named_trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that receive gradients, under their state-dict names."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def parameter_names(model: nn.Module) -> dict[Tensor, str]:
    """Parameter -> its state-dict name."""
    return {parameter: name for name, parameter in model.named_parameters()}


def is_decayed(name: str, parameter: Tensor, exempt: Collection[str]) -> bool:
    """Matrices and convolutions decay; gains, biases, the temperature and what the model exempts do not."""
    return parameter.ndim >= 2 and name not in exempt


def adamw_settings(optim: OptimConfig, model_name: str) -> tuple[float, float, float]:
    """(beta1, beta2, eps): given ones, else OpenCLIP's defaults, which differ for names that contain 'vit'."""
    is_vit = "vit" in model_name.lower()
    beta1 = 0.9 if optim.beta1 is None else optim.beta1
    beta2 = (0.98 if is_vit else 0.999) if optim.beta2 is None else optim.beta2
    eps = (1e-6 if is_vit else 1e-8) if optim.eps is None else optim.eps
    return beta1, beta2, eps


def build_optimizer(model: nn.Module, optim: OptimConfig, model_name: str, exempt: Iterable[str]) -> torch.optim.AdamW:
    """Fused AdamW over [not decayed, decayed]."""
    exempt = set(exempt)
    named = named_trainable(model)
    decayed = [p for name, p in named if is_decayed(name, p, exempt)]
    others = [p for name, p in named if not is_decayed(name, p, exempt)]
    beta1, beta2, eps = adamw_settings(optim, model_name)
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": optim.wd}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=optim.lr, betas=(beta1, beta2), eps=eps, fused=True)


def describe_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """One line: constants, and how many tensors and parameters decay and do not."""
    decayed = [p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]]
    others = [p for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]]
    (beta1, beta2), eps = optimizer.defaults["betas"], optimizer.defaults["eps"]
    decay = max(group["weight_decay"] for group in optimizer.param_groups)
    return (
        f"AdamW, betas {beta1:g} and {beta2:g}, eps {eps:g}; decay {decay:g} on {_size_of(decayed)} (matrices and "
        f"convolutions), none on {_size_of(others)} (gains, biases, positions, class tokens, temperature)"
    )


def _size_of(parameters: list[Tensor]) -> str:
    return f"{len(parameters)} tensors of {sum(p.numel() for p in parameters) / 1e6:.2f} M"


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The same rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
