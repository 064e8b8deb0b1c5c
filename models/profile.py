"""What a forward pass of a model costs: parameters, multiply-accumulates and activations of each tower.

Runs the model on torch's meta device, which has shapes and no memory, and adds up what its operations say of
themselves. Knows the towers only as modules of a model, so whatever `build_model` can build can be counted.

The conventions are those of the published tables (fvcore's, in which the comparisons of timm and OpenCLIP are
written), so that figures can be laid side by side:

- One MAC is a multiplication and an addition; OpenCLIP's `gflops` are twice the MACs. Counted are convolutions and
  matrix products, those inside attention in full even under a causal mask; not norms, biases and activation functions.
- Activations are the numbers that these operations put out, the attention maps among them. Fused attention never
  writes its maps, which are counted apart for that reason.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from models.clip import CLIP
from models.config import ModelConfig, pair
from models.factory import build_model

IMAGE, TEXT, DECODER, TOTAL = "image", "text", "decoder", "total"
# The towers that are a module of the model. All else but the temperature belongs to the text.
_MODULE_OF = {IMAGE: "visual", DECODER: "text_decoder"}
_TEMPERATURE = ("logit_scale", "logit_bias")


@dataclass(frozen=True)
class Cost:
    """Of one tower, or of the total: parameters, and the MACs and activations of one forward pass.

    attention_maps: those of the activations that fused attention does not write.
    """

    tower: str
    parameters: int
    macs: int
    activations: int
    attention_maps: int


@dataclass(frozen=True)
class ModelProfile:
    """The costs of a model's towers, and of all of it, for `batch_size` images and texts at these sizes."""

    name: str
    image_size: tuple[int, int]
    context_length: int
    batch_size: int
    towers: tuple[Cost, ...]
    total: Cost


def profile_model(config: ModelConfig, batch_size: int = 1) -> ModelProfile:
    """Counts a forward pass of `batch_size` images and as many texts of full length. Takes no memory for weights.

    Raises ConfigError for a model that cannot be built.
    """
    image_size, context_length = pair(config.vision_cfg.image_size), config.text_cfg.context_length
    with torch.device("meta"):
        model = build_model(config).eval()
        image = torch.zeros(batch_size, 3, *image_size)
        text = torch.zeros(batch_size, context_length, dtype=torch.int64)
    counted = _count(model, image, text)
    parameters = count_parameters(model)
    towers = tuple(
        _cost(tower, parameters[tower], [counted[tower]]) for tower in (IMAGE, TEXT, DECODER) if parameters[tower]
    )
    total = _cost(TOTAL, parameters.total(), list(counted.values()))
    return ModelProfile(config.name, image_size, context_length, batch_size, towers, total)


def count_parameters(model: CLIP) -> Counter[str]:
    """How many parameters each tower has; those of the temperature are under its own names."""
    tower_of = {module: tower for tower, module in _MODULE_OF.items()} | {name: name for name in _TEMPERATURE}
    numbers: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        numbers[tower_of.get(name.split(".")[0], TEXT)] += parameter.numel()
    return numbers


def _cost(tower: str, parameters: int, counted: list[Counter[str]]) -> Cost:
    added = sum(counted, Counter[str]())
    return Cost(tower, parameters, added["macs"], added["activations"], added["attention_maps"])


def _count(model: CLIP, image: Tensor, text: Tensor) -> dict[str, Counter[str]]:
    counting = _Counting()
    for tower, name in _MODULE_OF.items():
        if hasattr(model, name):
            counting.watch(tower, getattr(model, name))
    # The plain formula of attention is one of matrix products; a fused call would hide them from the count.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counting:
        model(image, text)
    return counting.counted


class _Counting(TorchDispatchMode):
    """Inside, each operation is counted for the tower that is running."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: dict[str, Counter[str]] = {tower: Counter() for tower in (IMAGE, TEXT, DECODER)}
        self._running = TEXT

    def watch(self, tower: str, module: nn.Module) -> None:
        """What runs inside `module` is counted for `tower`."""

        def enter(*_: Any) -> None:
            self._running = tower

        def leave(*_: Any) -> None:
            self._running = TEXT

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        counted = self.counted[self._running]
        if formula := flop_registry.get(func.overloadpacket):
            counted["macs"] += formula(*args, **(kwargs or {}), out_val=out) // 2
            counted["activations"] += out.numel()
        elif func.overloadpacket is torch.ops.aten._safe_softmax:
            # Of all softmaxes, only the plain formula of fused attention is this one; its input is the map.
            counted["attention_maps"] += out.numel()
        return out
