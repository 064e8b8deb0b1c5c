"""Model and optimiser in their start state, equal on all ranks: new, from weights, or as a checkpoint left them.

Composes what adapts, locks, wraps and averages a model, in the one order that works; owns no loop and no data.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

import models
from models.locks import Lock, layer_scales, lock_towers
from models.lora import Lora, adapt, load_adapter_state, plain_name
from training.checkpoint_content import LoadedCheckpoint, verify_weights
from training.combinations import uses_lora
from training.config import ModelConfig, OptimConfig, TrainConfig
from training.distributed import World
from training.ema import Ema
from training.errors import ConfigError
from training.optimizer import build_optimizer, parameter_names
from training.optimizer_state import load_optimizer_tensors
from training.parallel import parallelize
from training.precision import LossScale, build_loss_scale
from training.sharding import copy_rows
from training.start import Fresh, Pretrained, StartState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Learner:
    """The model, what the step calls of it, and its optimiser."""

    model: models.CLIP
    wrapped: torch.nn.Module
    optimizer: torch.optim.AdamW
    loss_scale: LossScale | None
    ema: Ema | None = None


def build_learner(
    config: TrainConfig,
    model_config: models.ModelConfig,
    start: StartState,
    loaded: LoadedCheckpoint | None,
    world: World,
) -> Learner:
    """Model and optimiser in their start state, equal on all ranks."""
    torch.manual_seed(config.run.seed)
    model = models.build_model(model_config).to(world.device)
    lock_as_told(model, config.model)
    # Only rank 0 reads weights: wrapping the model sends them to the others.
    with world.collectively("loading weights"):
        if world.is_main and isinstance(start, Pretrained):
            _load_pretrained(model, start.source)
        if world.is_main and isinstance(start, Fresh) and not config.model.pretrained:
            _load_published_text(model)
        if world.is_main and loaded is not None:
            _load_resumed(model, loaded, config.model)
    if uses_lora(config.model):
        # Order matters: weights are loaded under their plain names.
        with world.collectively("--lora-rank"):
            _adapt(model, config.model, loaded)
    if config.cluster.fsdp and not getattr(model.text_tower, "shardable", True):
        raise ConfigError(
            f"--fsdp: the text tower {model_config.text_cfg.hf_model_name} cannot be sharded; leave it out"
        )
    wrapped = parallelize(model, config.model, config.cluster, world)  # Collective:
    scales = layer_scales(model, config.optim.image_layer_decay, config.optim.text_layer_decay)
    optimizer = build_optimizer(model, config.optim, model_config.name, model.no_weight_decay(), scales)
    with world.collectively("loading the optimiser's state"):
        if loaded is not None:
            load_optimizer_tensors(optimizer, parameter_names(model), loaded.optimizer)
    ema = _build_ema(model, config.optim, loaded)
    return Learner(model, wrapped, optimizer, _loss_scale(config, loaded, world), ema)


def _build_ema(model: models.CLIP, optim: OptimConfig, loaded: LoadedCheckpoint | None) -> Ema | None:
    """As the checkpoint left it; from the weights of now where it has none."""
    if optim.model_ema_samples is None:
        if loaded is not None and loaded.ema is not None:
            log.warning("the checkpoint's averaged weights are left behind: there is no --model-ema-samples")
        return None
    ema = Ema(model, optim.model_ema_samples, optim.model_ema_rampup)
    if loaded is not None and loaded.ema is not None:
        ema.load(loaded.ema)
    elif loaded is not None:
        log.info("the checkpoint has no averaged weights: the average begins with its weights")
    return ema


def lock_as_told(model: models.CLIP, section: ModelConfig) -> None:
    """What --lock-image and --lock-text and their companions say."""
    image = Lock(section.lock_image_unlocked_groups, section.lock_image_freeze_bn_stats)
    text = Lock(section.lock_text_unlocked_layers, freeze_norms=section.lock_text_freeze_layer_norm)
    lock_towers(model, image if section.lock_image else None, text if section.lock_text else None)


def _loss_scale(config: TrainConfig, loaded: LoadedCheckpoint | None, world: World) -> LossScale | None:
    """As the checkpoint left it; a fresh one where it has none, as after a run in bf16."""
    loss_scale = build_loss_scale(config.model.precision, world.device)
    if loss_scale is not None and loaded is not None and "loss_scale" in loaded.state:
        loss_scale.load_state_dict(loaded.state["loss_scale"])
    return loss_scale


def _adapt(model: models.CLIP, section: ModelConfig, loaded: LoadedCheckpoint | None) -> None:
    """LoRA's adapters, as the checkpoint left them. Weights that were merged are then apart again."""
    image, text = section.lora_image_rank, section.lora_text_rank
    shared = section.lora_rank or 0
    lora = Lora(
        shared if image is None else image,
        shared if text is None else text,
        section.lora_alpha,
        section.lora_target,
        section.lora_train_projections,
    )
    for line in adapt(model, lora):
        log.info("LoRA: %s", line)
    if loaded is not None and loaded.lora is not None:
        load_adapter_state(model, loaded.lora)


@torch.no_grad()
def restore(learner: Learner, loaded: LoadedCheckpoint) -> None:
    """Put a learner that is in use back into the state of `loaded`. Every rank reads what it holds for itself."""
    for name, tensor in learner.model.state_dict().items():  # Shares memory, so that shards stay where they are.
        apart = loaded.lora or {}
        copy_rows(tensor, apart[name] if name in apart else loaded.model[plain_name(name)])
    load_optimizer_tensors(learner.optimizer, parameter_names(learner.model), loaded.optimizer)
    if learner.ema is not None:
        learner.ema.restart() if loaded.ema is None else learner.ema.load(loaded.ema)
    if learner.loss_scale is not None and "loss_scale" in loaded.state:
        learner.loss_scale.load_state_dict(loaded.state["loss_scale"])


def _load_published_text(model: models.CLIP) -> None:
    if line := models.load_published_text(model):
        log.info("%s", line)


def _load_pretrained(model: models.CLIP, source: str) -> None:
    verify_weights(source)
    for line in str(models.load_pretrained(model, source)).splitlines():
        log.info("%s", line)


def _load_resumed(model: models.CLIP, loaded: LoadedCheckpoint, section: ModelConfig) -> None:
    """Strictly, without resizing: what resumes is the same model."""
    stored, own = _without_tokenizer(loaded.model_config), _without_tokenizer(model.config.to_dict())
    changed = [key for key in own if stored.get(key) != own[key]]
    if changed:
        raise ConfigError(
            f"--resume {loaded.folder}: the checkpoint's model differs in {', '.join(changed)}; a resume never "
            "resizes. To start from its weights, use --pretrained and another --name"
        )
    if uses_lora(section) != (loaded.lora is not None):
        has, needs = ("adapters", "needs --lora-rank") if loaded.lora else ("no adapters", "takes no --lora-rank")
        raise ConfigError(
            f"--resume {loaded.folder}: the checkpoint has {has}, so it {needs}. To start from its merged weights, use "
            "--pretrained and another --name"
        )
    model.load_state_dict(loaded.model)


def _without_tokenizer(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """But for where the tokenizer's files are: `training.origin` compares what they do."""
    text = {key: value for key, value in model_config["text_cfg"].items() if key != "hf_tokenizer_name"}
    return {**model_config, "text_cfg": text}
