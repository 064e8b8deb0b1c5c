"""What a model is: frozen dataclasses in OpenCLIP's schema. No torch, no files, no environment.

Field names and defaults are OpenCLIP 3.3.0's, so that its JSON files decode as they are; settings that
only towers outside this package need are part of the schema and refused when such a tower is built.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from models.decode import decode
from models.errors import ConfigError

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Keyword arguments of a native tower's layer normalisations."""

    eps: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class ActivationConfig:
    """Keyword arguments of a native tower's GELU."""

    approximate: str = "none"


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The image tower: a timm trunk if `timm_model_name`, a ModifiedResNet if `layers` is a list, else a ViT."""

    layers: int | tuple[int, ...] = 12
    width: int = 768
    head_width: int = 64
    mlp_ratio: float = 4.0
    patch_size: int | tuple[int, ...] | None = 16
    image_size: int | tuple[int, ...] = 224
    ls_init_value: float | None = None
    patch_dropout: float = 0.0
    attentional_pool: bool | str = False
    attn_pooler_queries: int = 256
    attn_pooler_heads: int = 8
    no_ln_pre: bool = False
    pos_embed_type: str = "learnable"
    final_ln_after_pool: bool = False
    pool_type: str = "tok"
    output_tokens: bool = False
    act_kwargs: ActivationConfig | None = None
    norm_kwargs: NormConfig | None = None
    block_type: str | None = None
    qk_norm: bool = False
    scaled_cosine_attn: bool = False
    scale_heads: bool = False
    scale_attn_inner: bool = False
    scale_attn: bool = False
    scale_fc: bool = False
    timm_model_name: str | None = None
    timm_model_pretrained: bool = False
    timm_pool: str = "avg"
    timm_proj: str = "linear"
    timm_proj_bias: bool = False
    timm_drop: float = 0.0
    timm_drop_path: float | None = None


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text tower and what its tokens are."""

    context_length: int = 77
    vocab_size: int = 49408
    hf_tokenizer_name: str | None = None
    tokenizer_mode: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0
    ls_init_value: float | None = None
    embed_cls: bool = False
    pad_id: int = 0
    eos_id: int = 2
    no_causal_mask: bool = False
    final_ln_after_pool: bool = False
    pool_type: str = "argmax"
    proj_bias: bool = False
    proj_type: str = "linear"
    output_tokens: bool = False
    act_kwargs: ActivationConfig | None = None
    norm_kwargs: NormConfig | None = None
    block_type: str | None = None
    qk_norm: bool = False
    scaled_cosine_attn: bool = False
    scale_heads: bool = False
    scale_attn_inner: bool = False
    scale_attn: bool = False
    scale_fc: bool = False
    hf_model_name: str | None = None
    hf_model_pretrained: bool = True
    hf_proj_type: str = "mlp"
    hf_pooler_type: str = "mean_pooler"


@dataclass(frozen=True, kw_only=True)
class MultimodalConfig:
    """CoCa's decoder. `n_queries`, `attn_pooler_heads` and `dim_head` are in the schema and alter nothing."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0
    ls_init_value: float | None = None
    dim_head: int = 64
    n_queries: int = 256
    attn_pooler_heads: int = 8


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """How an image becomes the tower's input. `size` is one side, or (height, width), in pixels."""

    size: int | tuple[int, ...] = 224
    mode: str = "RGB"
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    def __post_init__(self) -> None:
        _one_of("preprocess_cfg.mode", self.mode, ("RGB",))
        _one_of("preprocess_cfg.interpolation", self.interpolation, ("bicubic", "bilinear"))
        _one_of("preprocess_cfg.resize_mode", self.resize_mode, ("shortest", "longest", "squash"))
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError("preprocess_cfg: mean and std need three values each, std above 0")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole model. The image size is said once, in `vision_cfg`; `preprocess.size` equals it."""

    name: str = ""
    embed_dim: int
    vision_cfg: VisionConfig
    text_cfg: TextConfig
    quick_gelu: bool = False
    custom_text: bool = False
    init_logit_scale: float = math.log(1 / 0.07)
    init_logit_bias: float | None = None
    multimodal_cfg: MultimodalConfig | None = None
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)

    def __post_init__(self) -> None:
        _check_vision(self.vision_cfg)
        _check_text(self.text_cfg)
        if self.text_cfg.hf_model_name and not self.custom_text:
            raise ConfigError("custom_text must be true for a tower of transformers: its keys are under text.")
        if self.multimodal_cfg is not None and not self.custom_text:
            raise ConfigError("custom_text must be true for a CoCa model: the keys of its text tower are under text.")
        if pair(self.preprocess.size) != pair(self.vision_cfg.image_size):
            raise ConfigError(
                f"preprocess_cfg.size {self.preprocess.size} differs from vision_cfg.image_size "
                f"{self.vision_cfg.image_size}: leave one out"
            )

    @classmethod
    def from_dict(cls, raw: Any, name: str = "") -> ModelConfig:
        """From OpenCLIP's schema, bare or as an `open_clip_config.json` with model_cfg and preprocess_cfg.

        Raises ConfigError for unknown keys, wrong types and values that fit no tower.
        """
        settings = _unwrap(raw)
        preprocess = dict(settings.pop("preprocess_cfg", None) or {})
        vision = settings.get("vision_cfg")
        if isinstance(vision, Mapping):
            preprocess.setdefault("size", vision.get("image_size", VisionConfig.image_size))
            # OpenCLIP writes both; to it they mean the same.
            settings["vision_cfg"] = {**vision, "timm_proj": vision.get("timm_proj", VisionConfig.timm_proj) or ""}
        settings.setdefault("name", name)
        if text := settings.get("text_cfg"):
            _settle_hf_text(settings, text)
        settings["preprocess"] = preprocess
        return decode(cls, settings)

    def to_dict(self) -> dict[str, Any]:
        """OpenCLIP's schema as plain JSON values, complete: a later default cannot alter a stored model.

        Only unset values are left out, because OpenCLIP reads the mere presence of some as a choice.
        """
        settings = _plain(self)
        settings["preprocess_cfg"] = settings.pop("preprocess")
        return settings


def config_with(
    config: ModelConfig,
    *,
    image_size: int | Sequence[int] | None = None,
    context_length: int | None = None,
    quick_gelu: bool | None = None,
    patch_dropout: float | None = None,
    drop_path: float | None = None,
    head_dropout: float | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    image_interpolation: str | None = None,
    image_resize_mode: str | None = None,
    init_logit_scale: float | None = None,
    init_logit_bias: float | None = None,
    tokenizer: str | None = None,
) -> ModelConfig:
    """A copy with some settings changed; None, and an empty sequence, leave a setting as it is.

    drop_path is stochastic depth in the image tower, head_dropout dropout in its head; only timm's trunks have them.
    Raises ConfigError for what the model cannot do.
    """
    _check_drops(config, drop_path, head_dropout)
    size = _as_size(image_size)
    vision = _replace(
        config.vision_cfg,
        image_size=size,
        patch_dropout=patch_dropout,
        timm_drop_path=drop_path,
        timm_drop=head_dropout,
    )
    text = _replace(config.text_cfg, context_length=context_length, hf_tokenizer_name=tokenizer)
    preprocess = _replace(
        config.preprocess,
        size=size,
        mean=tuple(image_mean) if image_mean else None,
        std=tuple(image_std) if image_std else None,
        interpolation=image_interpolation,
        resize_mode=image_resize_mode,
    )
    return _replace(
        config,
        vision_cfg=vision,
        text_cfg=text,
        preprocess=preprocess,
        quick_gelu=quick_gelu,
        init_logit_scale=init_logit_scale,
        init_logit_bias=init_logit_bias,
    )


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """One side, or (height, width), as (height, width)."""
    if isinstance(size, int):
        return size, size
    if len(size) not in (1, 2):
        raise ConfigError(f"a size is one side or (height, width), got {tuple(size)}")
    return size[0], size[-1]


def _check_drops(config: ModelConfig, drop_path: float | None, head_dropout: float | None) -> None:
    vision, name = config.vision_cfg, config.name or "the model"
    for setting, share in (("stochastic depth", drop_path), ("head dropout", head_dropout)):
        if share is not None and not vision.timm_model_name:
            raise ConfigError(f"{setting} {share}: the image tower of {name} is no timm trunk and has none")
        if share is not None and not 0.0 <= share < 1.0:
            raise ConfigError(f"{setting} must be in [0, 1), got {share}")
    if head_dropout and vision.timm_proj not in ("linear", "mlp"):
        raise ConfigError(f"head dropout {head_dropout}: the image tower of {name} has no head of its own to drop in")


def _as_size(size: int | Sequence[int] | None) -> int | tuple[int, ...] | None:
    if size is None or size == () or size == []:
        return None
    height, width = pair(size)
    return height if height == width else (height, width)


def _replace(config: Any, **changes: Any) -> Any:
    return dataclasses.replace(config, **{key: value for key, value in changes.items() if value is not None})


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        settings = {field.name: (getattr(value, field.name), field.default) for field in dataclasses.fields(value)}
        return {key: _plain(item) for key, (item, default) in settings.items() if not item is default is None}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _unwrap(raw: Any) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"a model configuration is a mapping with embed_dim, vision_cfg and text_cfg, got {raw!r}")
    settings = dict(raw)
    if "model_cfg" in settings:
        preprocess = settings.get("preprocess_cfg")
        settings = dict(settings["model_cfg"])
        settings.setdefault("preprocess_cfg", preprocess)
    # A checkpoint's own, see `models.provenance`.
    settings.pop("tokenizer", None)
    if settings.pop("nonscalar_logit_scale", False):
        raise ConfigError("nonscalar_logit_scale: only a scalar logit scale is supported")
    return settings


def _settle_hf_text(settings: dict[str, Any], text: Any) -> None:
    """A tower of transformers is a module of its own, said or not; OpenCLIP writes a missing projection as null."""
    if not isinstance(text, Mapping) or not text.get("hf_model_name"):
        return
    settings["custom_text"] = True
    if "hf_proj_type" in text and text["hf_proj_type"] is None:
        settings["text_cfg"] = {**text, "hf_proj_type": "none"}


def _check_vision(vision: VisionConfig) -> None:
    height, width = pair(vision.image_size)
    _positive("vision_cfg", image_size=min(height, width), width=vision.width, head_width=vision.head_width)
    if not 0.0 <= vision.patch_dropout < 1.0:
        raise ConfigError(f"vision_cfg.patch_dropout must be in [0, 1), got {vision.patch_dropout}")
    if vision.timm_model_name:
        return
    if isinstance(vision.layers, tuple):
        _check_resnet(vision, height, width)
        return
    if vision.patch_size is None:
        raise ConfigError("vision_cfg.patch_size: a ViT needs one")
    if vision.width % vision.head_width:
        raise ConfigError(f"vision_cfg.width {vision.width} is no multiple of head_width {vision.head_width}")
    patch_height, patch_width = pair(vision.patch_size)
    if height < patch_height or width < patch_width:
        raise ConfigError(f"vision_cfg.image_size {vision.image_size} is smaller than one patch of {vision.patch_size}")


def _check_resnet(vision: VisionConfig, height: int, width: int) -> None:
    if len(vision.layers) != 4:  # type: ignore[arg-type]
        raise ConfigError(f"vision_cfg.layers: a ModifiedResNet has four stages, got {list(vision.layers)}")  # type: ignore[arg-type]
    if height % 32 or width % 32:
        raise ConfigError(f"vision_cfg.image_size {vision.image_size}: a ModifiedResNet needs multiples of 32")
    if vision.width * 32 % vision.head_width or vision.width % 2:
        raise ConfigError(f"vision_cfg.width {vision.width} does not fit head_width {vision.head_width}")
    if vision.patch_dropout:
        raise ConfigError("vision_cfg.patch_dropout: a ModifiedResNet has no patches to drop")


def _check_text(text: TextConfig) -> None:
    _positive("text_cfg", context_length=text.context_length, vocab_size=text.vocab_size, heads=text.heads)
    if text.width % text.heads and not text.hf_model_name:
        raise ConfigError(f"text_cfg.width {text.width} is no multiple of heads {text.heads}")


def _positive(path: str, **numbers: int) -> None:
    for key, number in numbers.items():
        if number < 1:
            raise ConfigError(f"{path}.{key} must be at least 1, got {number}")


def _one_of(path: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{path}: {value!r} is none of {', '.join(choices)}")
