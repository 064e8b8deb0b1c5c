"""A text tower around an encoder of Hugging Face's transformers, under OpenCLIP's parameter names (`text.*`).

The only file that builds models of transformers. What an encoder is, says its `config.json`, from a folder or the
hub's cache; its weights come from there too, when a run begins with them. Knows no tokenizer and no rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.config import TextConfig
from models.errors import ConfigError
from models.hf_files import local_folder, transformers
from models.layer_groups import Prefixes, stack_groups
from models.unpadded import TextPlan, why_padding_counts


@dataclass(frozen=True)
class Architecture:
    """What differs between families of encoders: where their blocks are, and how many positions come before text."""

    blocks: str
    has_pooling_layer: bool = False
    offset_by_padding: bool = False
    shardable: bool = True


# By `model_type`: those that OpenCLIP knows.
ARCHITECTURES = {
    "roberta": Architecture("encoder.layer", has_pooling_layer=True, offset_by_padding=True),
    "xlm-roberta": Architecture("encoder.layer", has_pooling_layer=True, offset_by_padding=True),
    "bert": Architecture("encoder.layer", has_pooling_layer=True),
    "mt5": Architecture("block"),
    # Its forward pass in transformers fails on parameters that are shards.
    "m2m_100": Architecture("layers", shardable=False),
}

PROJECTIONS = ("linear", "mlp", "none")


class HFTextTower(nn.Module):
    """`transformer` is the encoder, `proj` what takes its pooled output to the features.

    Positions that hold the encoder's padding id are masked out of attention and pooling.
    """

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        assert config.hf_model_name is not None
        self.text_config = config
        self.hf_config = read_hf_config(config)
        self.pad_id: int = self.hf_config.pad_token_id
        self.transformer: Any = _encoder(self.hf_config, config.hf_pooler_type)
        self._pool = _pooler(config.hf_pooler_type)
        self.proj = _projection(config.hf_proj_type, self.hf_config.hidden_size, embed_dim)

    def forward(self, tokens: Tensor, plan: TextPlan | None = None) -> Tensor:
        return self.text_features(tokens, plan)

    @property
    def ignores_padding(self) -> bool:
        """False: padding is masked, but each of its positions runs."""
        return False

    def plan_text(self, tokens: Tensor, multiple: int = 1) -> TextPlan:
        """Raises ValueError: the encoder takes whole rows."""
        raise ValueError(f"this tower needs all positions: {why_padding_counts(self.text_config)}")

    def text_features(self, tokens: Tensor, plan: TextPlan | None = None) -> Tensor:
        """Token ids [B,L] to features [B,E], not normalised; L is anything up to the context length."""
        if plan is not None:
            raise ValueError("this tower has no plan of text without padding")
        if tokens.shape[1] > self.text_config.context_length:
            raise ValueError(f"this tower takes {self.text_config.context_length} tokens, got {tokens.shape[1]}")
        mask_BL = tokens != self.pad_id
        output = self.transformer(input_ids=tokens, attention_mask=mask_BL.long())
        return self.proj(self._pool(output, mask_BL))

    @property
    def shardable(self) -> bool:
        """Whether the encoder runs under FSDP2."""
        return ARCHITECTURES[self.hf_config.model_type].shardable

    def text_blocks(self) -> list[nn.Module]:
        """The encoder's layers: the units to compile, shard and recompute."""
        return list(self.transformer.get_submodule(ARCHITECTURES[self.hf_config.model_type].blocks))

    def layer_groups(self) -> Prefixes:
        """Parameters of one distance from the output, from the embeddings to the projection."""
        stem = ("transformer.embeddings", "transformer.embed_tokens")
        after = ("transformer.pooler", "transformer.final_layer_norm", "transformer.layer_norm")
        stack = f"transformer.{ARCHITECTURES[self.hf_config.model_type].blocks}"
        return stack_groups(stem, stack, len(self.text_blocks()), after, "proj")

    def set_text_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each layer in the backward pass instead of keeping its activations."""
        switch = "enable" if enable else "disable"
        # Renamed in transformers 5; what recomputes reentrantly does not work with DDP's static graph and FSDP2.
        call = getattr(self.transformer, f"activation_checkpointing_{switch}", None)
        call = call or getattr(self.transformer, f"gradient_checkpointing_{switch}")
        call({"use_reentrant": False}) if enable else call()
        if enable and hasattr(self.transformer, "_require_grads_hook"):
            # Embeddings that must have a gradient are for adapters; they would cost a locked tower a backward pass.
            self.transformer.disable_input_require_grads()

    @torch.no_grad()
    def load_published_weights(self) -> str:
        """The encoder's own weights, from where its configuration is. Returns what was loaded, for the log.

        Raises ConfigError where they are not there, or are not this encoder's.
        """
        name = self.text_config.hf_model_name
        folder = local_folder(str(name), "text_cfg.hf_model_name")
        try:
            published = _inner(transformers().AutoModel.from_pretrained(folder, local_files_only=True))
            self.transformer.load_state_dict(_in_fp32(published, self.transformer))
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"text_cfg.hf_model_name: the weights of {name} cannot be loaded from {folder}: {_one_line(error)}. "
                "With hf_model_pretrained false the text tower starts from random weights"
            ) from None
        return f"text tower starts from {name} ({folder})"


def read_hf_config(config: TextConfig) -> Any:
    """The encoder's configuration. Raises ConfigError where it is not on this machine, or fits no tower here."""
    name = str(config.hf_model_name)
    folder = local_folder(name, "text_cfg.hf_model_name")
    try:
        hf_config = transformers().AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"text_cfg.hf_model_name: {folder} has no usable config.json: {_one_line(error)}") from None
    _check(hf_config, config, name)
    # Ranks would leave out different layers, and wait for gradients of the others'.
    if getattr(hf_config, "encoder_layerdrop", 0):
        hf_config.encoder_layerdrop = 0.0
    return hf_config


def _check(hf_config: Any, config: TextConfig, name: str) -> None:
    architecture = ARCHITECTURES.get(hf_config.model_type)
    if architecture is None:
        raise ConfigError(
            f"text_cfg.hf_model_name: {name} is a {hf_config.model_type}; known are {', '.join(ARCHITECTURES)}"
        )
    if hf_config.pad_token_id is None:
        raise ConfigError(f"text_cfg.hf_model_name: {name} has no pad_token_id, so padding could not be told from text")
    limit = _max_positions(hf_config, architecture)
    if limit is not None and config.context_length > limit:
        raise ConfigError(f"text_cfg.context_length {config.context_length}: {name} has {limit} positions")


def _max_positions(hf_config: Any, architecture: Architecture) -> int | None:
    """The longest text; None for encoders that compute positions of any length."""
    if not architecture.has_pooling_layer:
        return None
    return hf_config.max_position_embeddings - (hf_config.pad_token_id + 1) * architecture.offset_by_padding


def _encoder(hf_config: Any, pooler: str) -> nn.Module:
    """A fresh encoder in fp32, whatever precision its published weights have."""
    with_layer = ARCHITECTURES[hf_config.model_type].has_pooling_layer
    options = {"add_pooling_layer": pooler == "cls_pooler"} if with_layer else {}
    return _inner(transformers().AutoModel.from_config(hf_config, **options)).float()


def _inner(model: Any) -> Any:
    """The encoder of a model that has a decoder too."""
    return model.encoder if model.config.is_encoder_decoder else model


def _in_fp32(published: nn.Module, own: nn.Module) -> dict[str, Tensor]:
    """The weights that `own` has: with pooling layer or without."""
    keys = own.state_dict().keys()
    return {key: value.float() for key, value in published.state_dict().items() if key in keys}


def _mean(output: Any, mask_BL: Tensor) -> Tensor:
    hidden_BLD, kept_BL1 = output.last_hidden_state, mask_BL.unsqueeze(-1)
    return (hidden_BLD * kept_BL1).sum(dim=1) / kept_BL1.sum(dim=1)


def _max(output: Any, mask_BL: Tensor) -> Tensor:
    return output.last_hidden_state.masked_fill(~mask_BL.unsqueeze(-1), -torch.inf).amax(dim=1)


def _first_hidden(output: Any, mask_BL: Tensor) -> Tensor:
    return output.last_hidden_state[:, 0]


def _first(output: Any, mask_BL: Tensor) -> Tensor:
    """Through the encoder's own pooling layer, where it has one."""
    pooled = getattr(output, "pooler_output", None)
    return _first_hidden(output, mask_BL) if pooled is None else pooled


POOLERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "mean_pooler": _mean,
    "max_pooler": _max,
    "cls_pooler": _first,
    "cls_last_hidden_state_pooler": _first_hidden,
}


def _pooler(name: str) -> Callable[[Any, Tensor], Tensor]:
    if name not in POOLERS:
        raise ConfigError(f"text_cfg.hf_pooler_type: {name!r} is none of {', '.join(POOLERS)}")
    return POOLERS[name]


def _projection(kind: str, width: int, embed_dim: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(width, embed_dim, bias=False)
    if kind == "mlp":
        middle = (width + embed_dim) // 2
        first, second = nn.Linear(width, middle, bias=False), nn.Linear(middle, embed_dim, bias=False)
        return nn.Sequential(first, nn.GELU(), second)
    if kind != "none":
        raise ConfigError(f"text_cfg.hf_proj_type: {kind!r} is none of {', '.join(PROJECTIONS)}")
    if width != embed_dim:
        raise ConfigError(f"text_cfg.hf_proj_type none needs an encoder of embed_dim {embed_dim}, this one has {width}")
    return nn.Identity()


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:200] + "..."
