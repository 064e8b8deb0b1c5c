"""An image tower around a timm trunk, under OpenCLIP's parameter names. The only file that imports timm."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import timm
from timm.layers import AttentionPool2d, Mlp, RotAttentionPool2d, resample_abs_pos_embed
from timm.models import get_pretrained_cfg, group_parameters
from torch import Tensor, nn

from models.config import VisionConfig, pair
from models.decode import did_you_mean
from models.errors import ConfigError
from models.layer_groups import Prefixes

_ATTENTION_POOLS = ("abs_attn", "rot_attn")
_HEADS = ("linear", "mlp")
# Where timm's families keep their repeated blocks: directly, or inside each stage.
_STACKS = ("blocks", "stages", "layers")


class TimmTower(nn.Module):
    """`trunk` is timm's model without its classifier, `head` our pooling and projection.

    The trunk is always built for the configured image size and never with downloaded weights.
    """

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        self.image_size = pair(config.image_size)
        self.trunk: Any = _trunk(config, embed_dim)
        self.head = _head(config, embed_dim, self.trunk)

    def forward(self, image: Tensor) -> Tensor:
        """Normalised images [B,3,h,w] to features [B,E], not normalised."""
        return self.head(self.trunk(image))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        try:
            self.trunk.set_grad_checkpointing(enable)
        except (AttributeError, AssertionError, NotImplementedError):
            name = type(self.trunk).__name__
            raise ConfigError(f"--grad-checkpointing: timm's {name} cannot recompute its blocks") from None

    def blocks(self) -> list[nn.Module]:
        """The trunk's residual blocks, or its stages where they have no blocks of their own."""
        for stack in _STACKS:
            if hasattr(self.trunk, stack):
                return [block for stage in getattr(self.trunk, stack) for block in _blocks_of(stage)]
        return []

    def no_weight_decay(self) -> set[str]:
        declared: set[str] = getattr(self.trunk, "no_weight_decay", set)()
        return {f"trunk.{name}" for name in declared}

    def layer_groups(self) -> Prefixes:
        """timm's own groups of the trunk, by its numbers for them, then the head."""
        by_number = group_parameters(self.trunk, self.trunk.group_matcher(coarse=False))
        trunk = [[f"trunk.{name}" for name in names] for _, names in sorted(by_number.items())]
        return [*trunk, ["head"]]

    @property
    def grid_size(self) -> tuple[int, int] | None:
        """Patches (down, across) of a trunk with absolute positions, else None."""
        patch_embed = getattr(self.trunk, "patch_embed", None)
        return getattr(patch_embed, "grid_size", None)

    def resample_positions(self, positions_1ND: Tensor, old_grid: tuple[int, int]) -> Tensor:
        """The trunk's position embedding, taken from another grid, by timm's own interpolation."""
        grid = list(self.grid_size or old_grid)
        return resample_abs_pos_embed(positions_1ND, grid, list(old_grid), self.num_prefix_positions)

    @property
    def num_prefix_positions(self) -> int:
        """How many positions belong to class and register tokens."""
        if getattr(self.trunk, "no_embed_class", False):
            return 0
        return getattr(self.trunk, "num_prefix_tokens", 1)


def _trunk(config: VisionConfig, embed_dim: int) -> Any:
    name: str = config.timm_model_name  # type: ignore[assignment]
    if not timm.is_model(name):
        raise ConfigError(f"vision_cfg.timm_model_name: timm has no {name!r}{did_you_mean(name, timm.list_models())}")
    _check_head(config)
    options: dict[str, Any] = {}
    if config.timm_drop_path is not None:
        options["drop_path_rate"] = config.timm_drop_path
    if config.patch_dropout > 0:
        options["patch_drop_rate"] = config.patch_dropout
    options |= _size_option(name, config)
    try:
        if config.timm_proj in _HEADS or config.timm_pool in _ATTENTION_POOLS:
            trunk = timm.create_model(name, pretrained=False, **options)
            _remove_classifier(trunk, config.timm_pool)
            return trunk
        num_classes = 0 if config.timm_proj == "none" else embed_dim
        return timm.create_model(
            name, pretrained=False, num_classes=num_classes, global_pool=config.timm_pool, **options
        )
    except TypeError as error:
        raise ConfigError(f"vision_cfg: timm's {name} does not take these settings: {error}") from None


def _size_option(name: str, config: VisionConfig) -> dict[str, Any]:
    """`img_size` for trunks built for one size; the others take any."""
    defaults = get_pretrained_cfg(name)
    if defaults is None or not defaults.fixed_input_size or pair(config.image_size) == defaults.input_size[-2:]:
        return {}
    return {"img_size": pair(config.image_size)}


def _remove_classifier(trunk: Any, pool: str) -> None:
    if pool in _ATTENTION_POOLS:
        trunk.reset_classifier(0, global_pool="")
    elif pool:
        trunk.reset_classifier(0, global_pool=pool)
    else:
        trunk.reset_classifier(0)


def _head(config: VisionConfig, embed_dim: int, trunk: Any) -> nn.Sequential:
    layers = OrderedDict[str, nn.Module]()
    width = embed_dim if config.timm_proj not in _HEADS else trunk.num_features
    if config.timm_pool in _ATTENTION_POOLS:
        layers["pool"] = _attention_pool(config.timm_pool, trunk, embed_dim)
        width = embed_dim
    if config.timm_proj == "linear":
        layers["drop"] = nn.Dropout(config.timm_drop)
        layers["proj"] = nn.Linear(width, embed_dim, bias=config.timm_proj_bias)
    elif config.timm_proj == "mlp":
        drop, bias = (config.timm_drop, 0.0), (True, config.timm_proj_bias)
        layers["mlp"] = Mlp(width, 2 * embed_dim, embed_dim, drop=drop, bias=bias)
    return nn.Sequential(layers)


def _attention_pool(pool: str, trunk: Any, embed_dim: int) -> nn.Module:
    if pool == "rot_attn":
        return RotAttentionPool2d(trunk.num_features, out_features=embed_dim)
    return AttentionPool2d(trunk.num_features, feat_size=trunk.default_cfg["pool_size"], out_features=embed_dim)


def _check_head(config: VisionConfig) -> None:
    if config.timm_proj not in (*_HEADS, "none", ""):
        raise ConfigError(f"vision_cfg.timm_proj: {config.timm_proj!r} is none of linear, mlp, none, ''")


def _blocks_of(stage: nn.Module) -> list[nn.Module]:
    inner = getattr(stage, "blocks", None)
    return list(inner) if isinstance(inner, nn.ModuleList | nn.Sequential) else [stage]
