"""AdamW and its parameter groups. Knows names and shapes of parameters, nothing of their owners."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

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
    """Matrices and convolutions decay; gains, biases, the temperature and what the model exempts do not.

    A gain may be [C, 1, 1], and a query [1, 1, D]: what counts are dimensions longer than 1.
    """
    return sum(length > 1 for length in parameter.shape) >= 2 and name not in exempt


def adamw_settings(optim: OptimConfig, model_name: str) -> tuple[float, float, float]:
    """(beta1, beta2, eps): given ones, else OpenCLIP's defaults, which differ for names that contain 'vit'."""
    is_vit = "vit" in model_name.lower()
    beta1 = 0.9 if optim.beta1 is None else optim.beta1
    beta2 = (0.98 if is_vit else 0.999) if optim.beta2 is None else optim.beta2
    eps = (1e-6 if is_vit else 1e-8) if optim.eps is None else optim.eps
    return beta1, beta2, eps


def build_optimizer(
    model: nn.Module,
    optim: OptimConfig,
    model_name: str,
    exempt: Iterable[str],
    scales: Mapping[str, float] | None = None,
) -> torch.optim.AdamW:
    """Fused AdamW over [not decayed, decayed], for each factor of the learning rate.

    scales: these factors by parameter name; 1 for the others.
    """
    exempt, scales = set(exempt), scales or {}
    grouped: defaultdict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named_trainable(model):
        grouped[scales.get(name, 1.0), is_decayed(name, parameter, exempt)].append(parameter)
    beta1, beta2, eps = adamw_settings(optim, model_name)
    groups = [
        {"params": parameters, "weight_decay": optim.wd * decays, "lr_scale": scale}
        for (scale, decays), parameters in sorted(grouped.items(), key=lambda entry: entry[0])
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(beta1, beta2), eps=eps, fused=True)


def describe_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """One line: constants, and how many tensors and parameters decay and do not."""
    decayed = [p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]]
    others = [p for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]]
    (beta1, beta2), eps = optimizer.defaults["betas"], optimizer.defaults["eps"]
    decay = max(group["weight_decay"] for group in optimizer.param_groups)
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    slowest = f"; learning rates down to {min(scales):.3g} of --lr" if min(scales) < 1 else ""
    return (
        f"AdamW, betas {beta1:g} and {beta2:g}, eps {eps:g}; decay {decay:g} on {_size_of(decayed)} (matrices and "
        f"convolutions), none on {_size_of(others)} (gains, biases, positions, class tokens, temperature){slowest}"
    )


def _size_of(parameters: list[Tensor]) -> str:
    return f"{len(parameters)} tensors of {sum(p.numel() for p in parameters) / 1e6:.2f} M"


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """This rate for every group, times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
