"""The teacher of a distillation: which model, whether it fits the student, its frozen copy on every rank.

It is no part of the learner: not wrapped, not trained, not in any checkpoint.
"""

from __future__ import annotations

import logging

import torch.distributed as dist

import models
from training.checkpoint_content import verify_weights
from training.config import ModelConfig
from training.distributed import World
from training.errors import ConfigError

log = logging.getLogger(__name__)

# What decides the token ids that a caption becomes.
_TOKENS = ("context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")


def resolve_teacher(section: ModelConfig, student: models.ModelConfig) -> models.ModelConfig | None:
    """The teacher's configuration, if there is one. Raises ConfigError when it cannot read the student's batches."""
    if section.distill_model is None:
        return None
    try:
        teacher = models.load_model_config(section.distill_model)
    except ConfigError as error:
        raise ConfigError(f"--distill-model: {error}") from error
    for problem in _differences(teacher, student):
        raise ConfigError(f"--distill-model {section.distill_model}: {problem}")
    return teacher


def _differences(teacher: models.ModelConfig, student: models.ModelConfig) -> list[str]:
    """Teacher and student see the same tensors: what one of them would read otherwise."""
    problems = [
        f"its text_cfg.{key} is {getattr(teacher.text_cfg, key)!r}, the student's {getattr(student.text_cfg, key)!r}; "
        "both read the same tokens"
        for key in _TOKENS
        if getattr(teacher.text_cfg, key) != getattr(student.text_cfg, key)
    ]
    theirs, ours = teacher.preprocess, student.preprocess
    if models.pair(theirs.size) != models.pair(ours.size):
        problems.append(
            f"it takes images of {theirs.size}, the student of {ours.size}; both see the same pixels, and resized ones "
            "would teach what the teacher does not know: choose another teacher, or --force-image-size for the student"
        )
    if (theirs.mean, theirs.std) != (ours.mean, ours.std):
        problems.append(
            f"its pixels are normalised with {theirs.mean} and {theirs.std}; give them as --image-mean and --image-std"
        )
    return problems


def build_teacher(section: ModelConfig, config: models.ModelConfig | None, world: World) -> models.CLIP | None:
    """The frozen teacher in evaluation mode with its weights, equal on all ranks. Collective."""
    if config is None:
        return None
    teacher = models.build_model(config)
    with world.collectively("--distill-pretrained"):
        if world.is_main:
            assert section.distill_pretrained is not None, "the rules ask for it"
            verify_weights(section.distill_pretrained)
            report = models.load_pretrained(teacher, section.distill_pretrained)
            log.info("teacher: %s, %s", section.distill_model, report)
    teacher = teacher.to(world.device).eval().requires_grad_(False)
    if world.size > 1:
        # Only rank 0 reads weights.
        for tensor in teacher.state_dict().values():
            dist.broadcast(tensor, src=0)  # Collective:
    return teacher
