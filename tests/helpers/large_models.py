"""Models of any size for comparisons: built without the minutes of initialisation, filled alike, cut where wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_SMALL = 1_000_000  # elements; what is drawn or filled in place below this may be a buffer that counts


class without_initialisation(TorchFunctionMode):
    """Inside, large tensors keep what their memory happens to hold, so that the system need not provide it yet."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        target = args[0] if args else kwargs.get("tensor")
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place and isinstance(target, Tensor) and target.numel() > _SMALL:
            return target
        if func is torch.randn and len(args) > 1:
            return torch.empty(*args)
        return func(*args, **kwargs)


def cut_stacks(model: nn.Module, depth: int) -> None:
    """Leaves the first `depth` blocks of every stack of a transformer, and of every stage of a ConvNeXt."""
    for module in list(model.modules()):
        for name in ("resblocks", "blocks", "cross_attn"):
            stack = getattr(module, name, None)
            if isinstance(stack, nn.ModuleList | nn.Sequential) and len(stack) > depth:
                setattr(module, name, stack[:depth])


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Weights that let signals pass at any depth: matrices by their inputs, gains about 1, biases about 0."""
    generator = torch.Generator().manual_seed(0)
    for key, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if tensor.ndim == 0:
            tensor.fill_(1.0)
        elif key.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.ndim == 1:
            tensor.normal_(float(key.endswith("weight")), 0.1, generator=generator)
        else:
            tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
