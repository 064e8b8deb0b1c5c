"""What a fine-tuning leaves alone, and how fast the rest learns. Sets `requires_grad`; knows no optimiser.

A tower that is locked whole costs no backward pass: nothing in it asks for a gradient, so none of its activations
are kept (Zhai et al. 2022, "LiT: Zero-shot transfer with locked-image text tuning").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.clip import CLIP
from models.errors import ConfigError
from models.layer_groups import Groups, image_groups, text_groups


@dataclass(frozen=True)
class Lock:
    """unlocked_groups: of a tower's layer groups, so many stay trainable, counted from the output.

    freeze_statistics: batch norms of locked groups also keep their running statistics, and normalise by them.
    freeze_norms: layer norms of locked groups are locked too.
    """

    unlocked_groups: int = 0
    freeze_statistics: bool = False
    freeze_norms: bool = True


def lock_towers(model: CLIP, image: Lock | None = None, text: Lock | None = None) -> None:
    """Locks what is given; the temperature stays trainable. Raises ConfigError for more groups than a tower has."""
    if image is not None:
        _lock(model, image_groups(model), image, "--lock-image-unlocked-groups")
    if text is not None:
        _lock(model, text_groups(model), text, "--lock-text-unlocked-layers")


def layer_scales(model: CLIP, image_decay: float | None, text_decay: float | None) -> dict[str, float]:
    """Factors of the learning rate by parameter name, where they are not 1: `decay` to the power of the group's
    distance from the output (Clark et al. 2020, "ELECTRA", appendix A; Bao et al. 2022, "BEiT", appendix)."""
    scales: dict[str, float] = {}
    for decay, groups in ((image_decay, image_groups), (text_decay, text_groups)):
        for distance, group in enumerate(reversed(groups(model) if decay is not None else [])):
            scales |= dict.fromkeys(group, float(decay or 0) ** distance)
    return {name: scale for name, scale in scales.items() if scale != 1.0}


def _lock(model: CLIP, groups: Groups, lock: Lock, flag: str) -> None:
    if lock.unlocked_groups > len(groups):
        raise ConfigError(f"{flag} {lock.unlocked_groups}: this tower has {len(groups)} groups of layers")
    locked = {name for group in groups[: len(groups) - lock.unlocked_groups] for name in group}
    trainable = set() if lock.freeze_norms else set(_parameters_of(model, nn.LayerNorm))
    for name, parameter in model.named_parameters():
        if name in locked - trainable:
            parameter.requires_grad_(False)
    if lock.freeze_statistics:
        model.freeze_statistics(
            module
            for path, module in model.named_modules()
            if isinstance(module, _BatchNorm) and locked.intersection(_own_parameters(path, module))
        )


def _parameters_of(model: nn.Module, kind: type[nn.Module]) -> Iterator[str]:
    for path, module in model.named_modules():
        if isinstance(module, kind):
            yield from _own_parameters(path, module)


def _own_parameters(path: str, module: nn.Module) -> Iterator[str]:
    return (f"{path}.{name}" for name, _ in module.named_parameters(recurse=False))
