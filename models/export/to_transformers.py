"""transformers' form: a CLIPModel or a SiglipModel with its tokenizer and image processor. Reads with transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from models.clip import CLIP
from models.config import ActivationConfig, ModelConfig, NormConfig, TextConfig, VisionConfig, pair
from models.errors import ConfigError
from models.export.target import Encoders
from models.timm_tower import TimmTower
from models.tokenizer import ClipTokenizer, vocabulary
from models.transformers_keys import ours_to_clip, ours_to_siglip

START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Transformers:
    """Holds native pairs of towers of CLIP's own shape, and SigLIP's."""

    name: str = "transformers"
    tolerance: float = 1e-5

    def refusal(self, config: ModelConfig) -> str | None:
        reasons = _siglip_reasons(config) if _is_siglip(config) else _clip_reasons(config)
        return next(reasons, None)

    def write(self, model: CLIP, folder: Path) -> None:
        transformers = _library()
        if _is_siglip(model.config):
            theirs = transformers.SiglipModel(_siglip_config(model))
            state = ours_to_siglip(model.state_dict())
        else:
            theirs = transformers.CLIPModel(_clip_config(model.config))
            state = ours_to_clip({key.removeprefix("text."): value for key, value in model.state_dict().items()})
        theirs.load_state_dict(state, strict=True)
        theirs.save_pretrained(folder)
        _image_processor(model.config).save_pretrained(folder)
        if _has_clip_tokens(model.config.text_cfg):
            _tokenizer(model.config.text_cfg, folder).save_pretrained(folder)

    def read(self, folder: Path, model: CLIP) -> Encoders:
        transformers = _library()
        theirs = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)

        def image(pixels: Tensor) -> Tensor:
            return F.normalize(_features(theirs.get_image_features(pixel_values=pixels)), dim=-1)

        def text(tokens: Tensor) -> Tensor:
            return F.normalize(_features(theirs.get_text_features(input_ids=tokens)), dim=-1)

        def prepare(picture: Image.Image) -> Tensor:
            return processor(images=picture, return_tensors="pt")["pixel_values"]

        def caption(words: str) -> Tensor:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            length = model.config.text_cfg.context_length
            found = tokenizer([words], padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            return text(found["input_ids"])

        has_tokenizer = _has_clip_tokens(model.config.text_cfg)
        return Encoders(image, text, prepare, caption if has_tokenizer else None)


def _library() -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError("--to transformers needs transformers: pip install 'clipyard[hf]'") from None
    return transformers


def _features(output: Any) -> Tensor:
    """Newer releases give an output object."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _is_siglip(config: ModelConfig) -> bool:
    return config.vision_cfg.timm_model_name is not None and "siglip" in config.vision_cfg.timm_model_name


def _clip_reasons(config: ModelConfig) -> Iterator[str]:
    vision, text = config.vision_cfg, config.text_cfg
    if vision.timm_model_name:
        yield f"transformers' CLIPModel has no {vision.timm_model_name} as image tower"
    if isinstance(vision.layers, tuple):
        yield "transformers' CLIPModel has no ResNet as image tower"
    yield from _differing("vision_cfg", vision, VisionConfig(), _OPEN_VISION)
    yield from _differing("text_cfg", text, TextConfig(), _OPEN_TEXT)
    if config.init_logit_bias is not None:
        yield "transformers' CLIPModel has no bias of the logits"
    if text.vocab_size != ClipTokenizer.vocab_size:
        yield f"text_cfg.vocab_size {text.vocab_size}: the end of a text is known of CLIP's own vocabulary only"
    yield from _preprocess_reasons(config)


def _siglip_reasons(config: ModelConfig) -> Iterator[str]:
    vision, text = config.vision_cfg, config.text_cfg
    if (vision.timm_pool, vision.timm_proj) != ("map", "none"):
        yield "transformers' SiglipModel pools by attention and has no projection of its own"
    if text.hf_model_name:
        yield f"transformers' SiglipModel has no {text.hf_model_name} as text tower"
    if not (text.no_causal_mask and text.proj_bias and text.pool_type == "last"):
        yield "transformers' SiglipModel wants text_cfg no_causal_mask, proj_bias and pool_type last"
    if config.init_logit_bias is None:
        yield "transformers' SiglipModel has a bias of the logits: init_logit_bias is missing"
    yield from _preprocess_reasons(config)


# What CLIPModel's configuration can say.
_OPEN_VISION = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout", "act_kwargs",
                "norm_kwargs", "output_tokens", "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj",
                "timm_proj_bias", "timm_drop", "timm_drop_path"}  # fmt: skip
_OPEN_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "act_kwargs", "norm_kwargs",
              "pad_id", "eos_id", "output_tokens", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"}  # fmt: skip


def _differing(path: str, section: object, plain: object, open_keys: set[str]) -> Iterator[str]:
    for key, value in vars(section).items():
        if key not in open_keys and value != getattr(plain, key):
            yield f"transformers' CLIPModel has no {path}.{key} {value!r}"


def _preprocess_reasons(config: ModelConfig) -> Iterator[str]:
    sizes = (config.preprocess.size, config.vision_cfg.image_size, config.vision_cfg.patch_size or 16)
    if any(height != width for height, width in map(pair, sizes)):
        yield "transformers' image towers take square images and patches"
    if config.preprocess.resize_mode == "longest":
        yield "transformers' image processors do not fit the longest side (preprocess_cfg.resize_mode longest)"


def _clip_config(config: ModelConfig) -> Any:
    transformers = _library()
    vision, text = config.vision_cfg, config.text_cfg
    vision_config = {
        "hidden_size": vision.width,
        "intermediate_size": int(vision.width * vision.mlp_ratio),
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.width // vision.head_width,
        "image_size": pair(vision.image_size)[0],
        "patch_size": pair(vision.patch_size or 16)[0],
        "projection_dim": config.embed_dim,
        **_norm_and_activation(vision.norm_kwargs, vision.act_kwargs, config.quick_gelu),
    }
    text_config = {
        **_text_sizes(text),
        "projection_dim": config.embed_dim,
        "bos_token_id": ClipTokenizer.sot_id,
        "eos_token_id": ClipTokenizer.eot_id,
        "pad_token_id": text.pad_id,
        **_norm_and_activation(text.norm_kwargs, text.act_kwargs, config.quick_gelu),
    }
    return transformers.CLIPConfig(
        vision_config=vision_config,
        text_config=text_config,
        projection_dim=config.embed_dim,
        logit_scale_init_value=config.init_logit_scale,
    )


def _siglip_config(model: CLIP) -> Any:
    transformers = _library()
    assert isinstance(model.visual, TimmTower)
    trunk, text = model.visual.trunk, model.config.text_cfg
    block = trunk.blocks[0]
    vision_config = {
        "hidden_size": trunk.embed_dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": model.visual.image_size[0],
        "patch_size": trunk.patch_embed.patch_size[0],
        "layer_norm_eps": block.norm1.eps,
        "hidden_act": _name_of(block.mlp.act),
    }
    text_config = {
        **_text_sizes(text),
        "projection_size": model.config.embed_dim,
        "pad_token_id": text.pad_id,
        "bos_token_id": None,
        "eos_token_id": None,
        **_norm_and_activation(text.norm_kwargs, text.act_kwargs, quick_gelu=False),
    }
    return transformers.SiglipConfig(vision_config=vision_config, text_config=text_config)


def _text_sizes(text: TextConfig) -> dict[str, int]:
    return {
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "intermediate_size": int(text.width * text.mlp_ratio),
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "max_position_embeddings": text.context_length,
    }


def _norm_and_activation(
    norm: NormConfig | None, activation: ActivationConfig | None, quick_gelu: bool
) -> dict[str, Any]:
    tanh = activation is not None and activation.approximate == "tanh"
    name = "quick_gelu" if quick_gelu else "gelu_pytorch_tanh" if tanh else "gelu"
    return {"layer_norm_eps": norm.eps if norm else NormConfig().eps, "hidden_act": name}


def _name_of(activation: nn.Module) -> str:
    # timm's tanh variant is a class of its own; torch's says it in an attribute.
    tanh = getattr(activation, "approximate", "none") == "tanh" or type(activation).__name__ == "GELUTanh"
    return "gelu_pytorch_tanh" if tanh else "gelu"


def _image_processor(config: ModelConfig) -> Any:
    transformers, preprocess = _library(), config.preprocess
    height, width = pair(preprocess.size)
    squash = preprocess.resize_mode == "squash"
    return transformers.CLIPImageProcessor(
        size={"height": height, "width": width} if squash else {"shortest_edge": height},
        do_center_crop=not squash,
        crop_size={"height": height, "width": width},
        resample=Image.Resampling[preprocess.interpolation.upper()],
        image_mean=list(preprocess.mean),
        image_std=list(preprocess.std),
        do_convert_rgb=True,
    )


def _has_clip_tokens(text: TextConfig) -> bool:
    return text.hf_tokenizer_name is None and text.vocab_size == ClipTokenizer.vocab_size


def _tokenizer(text: TextConfig, folder: Path) -> Any:
    """CLIP's, of the installed vocabulary. transformers neither repairs text nor reads HTML entities."""
    symbols, merges = vocabulary()
    ids = {symbol: number for number, symbol in enumerate([*symbols, START, END])}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return _library().CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=text.context_length,
    )


TARGET = Transformers()
