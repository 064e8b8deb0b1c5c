"""Evaluation outside of training: from a checkpoint and sets to figures. Composes; measures nothing itself."""

from __future__ import annotations

from pathlib import Path

import models
from training.checkpoint import MODEL_CONFIG_FILE, verify_weights
from training.checkpoint_files import find_latest
from training.config import DataConfig, EvalConfig
from training.distributed import World
from training.errors import CheckpointError, ConfigError
from training.evaluation.evaluator import Evaluator


def load_model(checkpoint: str, model: str | None, world: World) -> models.CLIP:
    """The model of a checkpoint, on the rank's device.

    checkpoint: a checkpoint folder, which knows its model; a run folder, which means its newest checkpoint; or a
    weights file, which needs `model`. Raises ConfigError or CheckpointError.
    """
    folder = Path(checkpoint)
    if (folder / "checkpoints").is_dir():
        newest, _ = find_latest(folder / "checkpoints")
        if newest is None:
            raise CheckpointError(f"--checkpoint {checkpoint}: the run has no checkpoint yet")
        folder = newest
        checkpoint = str(newest)
    own_config = folder / MODEL_CONFIG_FILE
    if model is None and not own_config.is_file():
        raise ConfigError(f"--checkpoint {checkpoint}: --model is needed, only a checkpoint folder knows its own")
    verify_weights(checkpoint)
    return models.create_model(model or str(own_config), checkpoint, device=world.device)


def evaluate_checkpoint(
    checkpoint: str,
    model: str | None,
    sets: EvalConfig,
    data: DataConfig,
    world: World,
    batch_size: int = 64,
    precision: str = "fp32",
) -> dict[str, float]:
    """The figures of all sets, under their names in `metrics.jsonl`; the same on every rank. Collective.

    Raises ConfigError, CheckpointError or DataError; a set that cannot be read is an error here.
    """
    if not (sets.zeroshot_data or sets.imagenet_val or data.val_data):
        raise ConfigError("nothing to evaluate: give --zeroshot-data, --imagenet-val or --val-data")
    with world.collectively(f"--checkpoint {checkpoint}"):
        clip = load_model(checkpoint, model, world)
    evaluator = Evaluator(
        sets,
        data,
        models.get_tokenizer(clip.config),
        models.InferenceTransform(clip.config.preprocess),
        world,
        batch_size=batch_size,
        workers=data.workers,
        precision=precision,
    )
    figures = evaluator.evaluate_sets(clip, evaluator.due(epoch=0, is_last=True), strict=True)
    assert figures is not None, "nobody can ask for a stop here"
    return figures
