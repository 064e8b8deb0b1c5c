"""Low-rank adaptation of the towers (Hu et al. 2022, "LoRA: Low-rank adaptation of large language models").

The adapters are peft's; here is where they go, what stays trainable beside them, and how adapters and weights become
one again, under the names that the model had without them. Knows no optimiser, no file and no rank.

peft adapts modules. The stacked projection of the native attention is a bare parameter, so it becomes a module
first: peft's own way with bare parameters makes them anew in each forward pass, which ends every compiled graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.clip import CLIP
from models.errors import ConfigError
from models.layers import Attention

_ADAPTER = "default"  # peft's name for a module's only adapter
_PROJECTIONS = ("visual.proj", "visual.head", "text_projection", "text.text_projection", "text.proj")
# A name that no module of another library has.
_STACKED = "stacked_in_proj"


@dataclass(frozen=True)
class Lora:
    """Ranks by tower (0 adapts nothing in it) and the scale of an adapter, alpha / rank; 1 without an alpha.

    targets: patterns for the ends of module names; every linear layer of the towers' blocks if there are none.
    train_projections: the towers' projections into the shared space are trained whole.
    A decoder beside the towers stays frozen.
    """

    image_rank: int
    text_rank: int
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    train_projections: bool = False


class LinearAttention(Attention):
    """The attention that it is made of, with the stacked projection as a module. Shares all parameters."""

    def __init__(self, attention: Attention) -> None:
        nn.Module.__init__(self)
        self.heads = attention.heads
        inner, outer = attention.in_proj_weight.shape[::-1]
        linear = nn.Linear(inner, outer, device="meta")
        linear.weight, linear.bias = attention.in_proj_weight, attention.in_proj_bias
        self.add_module(_STACKED, linear)
        self.out_proj = attention.out_proj

    def stacked(self, x: Tensor) -> Tensor:
        return self.get_submodule(_STACKED)(x)


# ---- adapting


def adapt(model: CLIP, lora: Lora) -> list[str]:
    """Adapters into the towers; all else is frozen, but for the temperature, the bias and, if asked, projections.

    Returns a line for each tower. The model computes what it did before: one factor of each adapter begins at 0.
    Raises ConfigError when peft is missing, or a tower has nothing to adapt.
    """
    model.requires_grad_(False)
    # Their statistics belong to the frozen weights.
    model.freeze_statistics(module for module in model.modules() if isinstance(module, _BatchNorm))
    lines = []
    for tower, rank, blocks in _towers(model, lora):
        targets = _targets(model, tower, blocks, lora.targets)
        for block, names in targets.items():
            _inject(block, names, rank, lora.alpha)
        lines.append(f"{tower} tower: rank {rank} on {sum(map(len, targets.values()))} matrices")
    for name, parameter in model.named_parameters():
        is_projection = name in _PROJECTIONS or name.startswith(tuple(f"{prefix}." for prefix in _PROJECTIONS))
        if ".lora_" in name or name in ("logit_scale", "logit_bias") or (lora.train_projections and is_projection):
            parameter.requires_grad_(True)
    return lines


def _towers(model: CLIP, lora: Lora) -> Iterator[tuple[str, int, list[nn.Module]]]:
    """(name, rank, blocks) of each tower to adapt."""
    image = model.visual.blocks()
    if lora.image_rank:
        yield "image", lora.image_rank, image
    if lora.text_rank:
        yield "text", lora.text_rank, model.blocks()[len(image) :]


def _targets(model: CLIP, tower: str, blocks: list[nn.Module], patterns: tuple[str, ...]) -> dict[nn.Module, list[str]]:
    """Block -> names in it of the layers to adapt."""
    paths = {module: path for path, module in model.named_modules()}
    for block in blocks:
        _make_stacked_modules(block, paths[block], patterns)
    called = _called_layers(model, tower)
    targets = {block: _chosen(block, paths[block], patterns, called) for block in blocks}
    if not any(targets.values()):
        kind = type(getattr(model.visual, "trunk", model.visual)).__name__ if tower == "image" else "text tower"
        asked = f"that --lora-target {' '.join(patterns)} names" if patterns else "in its blocks"
        raise ConfigError(
            f"--lora-{tower}-rank: the {tower} tower of {model.config.name or 'this model'} ({kind}) has no linear "
            f"layer {asked}; with 0 it stays as it is"
        )
    return {block: names for block, names in targets.items() if names}


def _make_stacked_modules(block: nn.Module, path: str, patterns: tuple[str, ...]) -> None:
    for name, module in list(block.named_modules()):
        if type(module) is Attention and _matches(f"{path}.{name}.in_proj", patterns):
            block.set_submodule(name, LinearAttention(module).train(module.training))


def _chosen(block: nn.Module, path: str, patterns: tuple[str, ...], called: set[nn.Module]) -> list[str]:
    return [
        name
        for name, module in block.named_modules()
        if module in called and _matches(f"{path}.{name}".replace(_STACKED, "in_proj"), patterns)
    ]


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatch(path, pattern) or fnmatch(path, f"*.{pattern}") for pattern in patterns)


@torch.no_grad()
def _called_layers(model: CLIP, tower: str) -> set[nn.Module]:
    """The linear layers that a forward pass calls. Of some, towers read the weight only: an adapter never ran."""
    called: set[nn.Module] = set()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [layer.register_forward_hook(lambda layer, *_: called.add(layer)) for layer in layers]
    was_training, device = model.training, model.logit_scale.device
    model.eval()
    try:
        if tower == "image":
            model.encode_image(torch.zeros(1, 3, *model.visual.image_size, device=device))
        else:
            length = model.config.text_cfg.context_length
            model.encode_text(torch.ones(1, length, dtype=torch.int64, device=device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return called


def _inject(block: nn.Module, names: list[str], rank: int, alpha: float | None) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError("LoRA needs peft: pip install 'clipyard[lora]'") from None
    # A pattern, not a list: peft takes the names of a list for ends of names.
    pattern = "|".join(map(re.escape, names))
    scale = rank if alpha is None else alpha
    config = LoraConfig(r=rank, lora_alpha=scale, target_modules=pattern, lora_dropout=0.0)  # type: ignore[arg-type]
    inject_adapter_in_model(config, block, _ADAPTER)


# ---- weights


def is_adapted(model: nn.Module) -> bool:
    """True after `adapt`."""
    return any(".lora_A." in name for name, _ in model.named_parameters())


def plain_name(name: str) -> str:
    """The name that a weight of an adapted model, not of an adapter, has without adapters."""
    return name.replace(".base_layer.", ".").replace(f".{_STACKED}.", ".in_proj_")


def merged_weights(model: nn.Module) -> Mapping[str, Tensor]:
    """The state dict that a model without adapters would need to compute the same, under that model's names."""
    return _Merged(model) if is_adapted(model) else model.state_dict()


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What merged weights no longer tell: all adapters, and the weights that they adapt. Shares memory."""
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if ".lora_" in name or name.endswith(".base_layer.weight")}


@torch.no_grad()
def load_adapter_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `adapter_state`. Raises ConfigError when these are adapters of other layers or another rank."""
    own = adapter_state(model)
    for name in sorted(own.keys() | tensors.keys()):
        ours, theirs = own.get(name), tensors.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            raise ConfigError(
                f"the adapters differ at {name}: {_shape(theirs)} in the checkpoint, {_shape(ours)} by --lora-rank "
                "and --lora-target; give the flags that it was trained with"
            )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else "x".join(map(str, tensor.shape))


class _Merged(Mapping[str, Tensor]):
    """Weights with their adapters added when looked at: of the sums, only one exists at a time."""

    def __init__(self, model: nn.Module) -> None:
        self._state = model.state_dict()
        self._keys = {plain_name(key): key for key in self._state if ".lora_" not in key}
        self._scales = {path: m.scaling[_ADAPTER] for path, m in model.named_modules() if hasattr(m, "lora_A")}

    def __getitem__(self, name: str) -> Tensor:
        key = self._keys[name]
        path, suffix, _ = key.rpartition(".base_layer.weight")
        if not suffix:
            return self._state[key]
        down, up = (self._state[f"{path}.lora_{factor}.{_ADAPTER}.weight"] for factor in "AB")
        return self._state[key] + self._scales[path] * (up @ down)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
