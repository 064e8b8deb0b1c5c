"""Evaluation outside of training: from a checkpoint and sets to figures. Composes; measures nothing itself."""

from __future__ import annotations

from pathlib import Path

import models
from training.checkpoint import MODEL_CONFIG_FILE
from training.checkpoint_files import find_latest
from training.config import DataConfig, EvalConfig
from training.distributed import World
from training.errors import CheckpointError, ConfigError
from training.evaluation.evaluator import Evaluator
from training.origin import open_tokenizer


def load_model(checkpoint: str, model: str | None, world: World) -> models.CLIP:
    """The model of a checkpoint, on the rank's device.

    checkpoint: a checkpoint folder, which knows its model; a run folder, which means its newest checkpoint; or a
    weights file, which needs `model`. Raises ConfigError or CheckpointError.
    """
    checkpoint = _newest(checkpoint)
    own_config = Path(checkpoint) / MODEL_CONFIG_FILE
    if model is None and not own_config.is_file():
        raise ConfigError(f"--checkpoint {checkpoint}: --model is needed, only a checkpoint folder knows its own")
    return models.create_model(model or str(own_config), checkpoint, device=world.device)


def _newest(checkpoint: str) -> str:
    """A run's newest checkpoint; what is no run stays as it is."""
    folder = Path(checkpoint) / "checkpoints"
    if not folder.is_dir():
        return checkpoint
    newest, _ = find_latest(folder)
    if newest is None:
        raise CheckpointError(f"--checkpoint {checkpoint}: the run has no checkpoint yet")
    return str(newest)


def evaluate_checkpoint(
    checkpoint: str,
    model: str | None,
    sets: EvalConfig,
    data: DataConfig,
    world: World,
    batch_size: int = 64,
    precision: str = "fp32",
    tokenizer: str | None = None,
) -> dict[str, float]:
    """The figures of all sets, under their names in `metrics.jsonl`; the same on every rank. Collective.

    tokenizer: where its files are, instead of where they were when the model was trained.
    Raises ConfigError, CheckpointError or DataError; a set that cannot be read is an error here.
    """
    if not (sets.zeroshot_data or sets.imagenet_val or data.val_data):
        raise ConfigError("nothing to evaluate: give --zeroshot-data, --imagenet-val or --val-data")
    with world.collectively(f"--checkpoint {checkpoint}"):
        clip = load_model(checkpoint, model, world)
        origin = models.read_provenance(_newest(checkpoint))
    reader = open_tokenizer(models.config_with(clip.config, tokenizer=tokenizer), origin, world)
    evaluator = Evaluator(
        sets,
        data,
        reader,
        models.InferenceTransform(clip.config.preprocess),
        world,
        batch_size=batch_size,
        workers=data.workers,
        precision=precision,
    )
    figures = evaluator.evaluate_sets(clip, evaluator.due(epoch=0, is_last=True), strict=True)
    assert figures is not None, "nobody can ask for a stop here"
    return figures
