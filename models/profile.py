"""What a forward pass of a model costs: parameters, multiply-accumulates and activations of each tower.

Runs the model on torch's meta device, which has shapes and no memory, and adds up what its operations say of
themselves. Knows of a model its encode methods and its keys' roots, so whatever `build_model` can build is counted.

The conventions are those of the published tables (fvcore's, in which the comparisons of timm and OpenCLIP are
written), so that figures can be laid side by side:

- One MAC is a multiplication and an addition; OpenCLIP's `gflops` are twice the MACs. Counted are convolutions and
  matrix products, those inside attention in full even under a causal mask; not norms, biases and activation functions.
- Activations are the numbers that these operations put out, the attention maps among them. Fused attention never
  writes its maps, which are counted apart for that reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from models.clip import CLIP
from models.config import ModelConfig, pair
from models.factory import build_model

IMAGE, TEXT, DECODER, TOTAL = "image", "text", "decoder", "total"
# Where a tower's parameters are; all others but the temperature's belong to the text.
_OWNER = {"visual": IMAGE, "text_decoder": DECODER, "logit_scale": "logit_scale", "logit_bias": "logit_bias"}


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
    parameters = count_parameters(model)
    counted = {IMAGE: _count(model.encode_image, image), TEXT: _count(model.encode_text, text)}
    if parameters[DECODER]:
        # It is what the whole model does beyond its two towers.
        counted[DECODER] = _count(model, image, text) - counted[IMAGE] - counted[TEXT]
    towers = tuple(_cost(tower, parameters[tower], found) for tower, found in counted.items())
    total = _cost(TOTAL, parameters.total(), sum(counted.values(), Counter[str]()))
    return ModelProfile(config.name, image_size, context_length, batch_size, towers, total)


def count_parameters(model: CLIP) -> Counter[str]:
    """How many parameters each tower has; those of the temperature are under their own names."""
    numbers: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        numbers[_OWNER.get(name.split(".")[0], TEXT)] += parameter.numel()
    return numbers


def _cost(tower: str, parameters: int, counted: Counter[str]) -> Cost:
    return Cost(tower, parameters, counted["macs"], counted["activations"], counted["attention_maps"])


def _count(run: Callable[..., Any], *inputs: Tensor) -> Counter[str]:
    # The plain formula of attention is one of matrix products; a fused call would hide them from the count.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _Counting() as counting:
        run(*inputs)
    return counting.counted


class _Counting(TorchDispatchMode):
    """Inside, each operation is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten._local_scalar_dense and args[0].dtype is torch.bool:
            # The text encoders of transformers ask whether a mask masks nothing, and full texts have no padding.
            return True
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func.overloadpacket):
            self.counted["macs"] += formula(*args, **(kwargs or {}), out_val=out) // 2
            self.counted["activations"] += out.numel()
        elif func.overloadpacket is torch.ops.aten._safe_softmax:
            # Of all softmaxes, only the plain formula of fused attention is this one; its input is the map.
            self.counted["attention_maps"] += out.numel()
        return out
