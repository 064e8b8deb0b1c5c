"""Evaluation outside of training: from a checkpoint and sets to figures. Composes; measures nothing itself."""

from __future__ import annotations

from pathlib import Path

import models
from training.checkpoint_content import EMA_FILE, MODEL_CONFIG_FILE, verify_weights
from training.checkpoint_files import find_latest
from training.config import DataConfig, EvalConfig
from training.distributed import World
from training.errors import CheckpointError, ConfigError
from training.evaluation.evaluator import Evaluator
from training.evaluation.exam import Exam
from training.evaluation.feed import ShouldStop
from training.evaluation.tasks import Task
from training.origin import open_tokenizer
from training.start import CHECKPOINTS


def newest_of(checkpoint: str) -> str:
    """The newest checkpoint of a run folder; what is none stays as it is. Raises CheckpointError for an empty run."""
    checkpoints = Path(checkpoint) / CHECKPOINTS
    if not checkpoints.is_dir():
        return checkpoint
    newest, _ = find_latest(checkpoints)
    if newest is None:
        raise CheckpointError(f"--checkpoint {checkpoint}: the run has no checkpoint yet")
    return str(newest)


def find_model(checkpoint: str, model: str | None, averaged: bool = False) -> tuple[str, str]:
    """The model's name or configuration file, and where its weights are; reads no weights.

    checkpoint: a checkpoint folder, which knows its model; a run folder, which means its newest checkpoint; or a
    weights file, which needs `model` unless it lies in a checkpoint folder. averaged: the folder's moving average of
    the weights instead. Raises ConfigError or CheckpointError.
    """
    checkpoint = newest_of(checkpoint)
    folder = Path(checkpoint)
    own_config = (folder.parent if folder.is_file() else folder) / MODEL_CONFIG_FILE
    if averaged:
        checkpoint = _average_in(folder)
    if model is None and not own_config.is_file():
        raise ConfigError(f"--checkpoint {checkpoint}: --model is needed, only a checkpoint folder knows its own")
    return model or str(own_config), checkpoint


def load_model(checkpoint: str, model: str | None, world: World, averaged: bool = False) -> models.CLIP:
    """What `find_model` finds, on the rank's device. Raises ConfigError or CheckpointError."""
    name, weights = find_model(checkpoint, model, averaged)
    verify_weights(weights)
    return models.create_model(name, weights, device=world.device)


def _average_in(folder: Path) -> str:
    if not (folder / EMA_FILE).is_file():
        raise ConfigError(f"--ema: {folder} has no {EMA_FILE}; a run with --model-ema-samples saves one")
    return str(folder / EMA_FILE)


def open_candidate(
    checkpoint: str,
    model: str | None,
    exam: Exam,
    world: World,
    averaged: bool = False,
    tokenizer: str | None = None,
    should_stop: ShouldStop | None = None,
    tasks: dict[str, Task] | None = None,
) -> tuple[models.CLIP, Evaluator]:
    """A model with what measures it: its own tokenizer and preprocessing, and the sets. Collective.

    tokenizer: where its files are, instead of where they were when the model was trained. tasks: the sets, where they
    were opened before.
    Raises ConfigError, CheckpointError or DataError.
    """
    exam.check()
    with world.collectively(f"--checkpoint {checkpoint}"):
        clip = load_model(checkpoint, model, world, averaged)
        origin = models.read_provenance(newest_of(checkpoint))
    return clip, open_evaluator(clip.config, origin, exam, world, tokenizer, should_stop, tasks)


def open_evaluator(
    config: models.ModelConfig,
    origin: models.Provenance | None,
    exam: Exam,
    world: World,
    tokenizer: str | None = None,
    should_stop: ShouldStop | None = None,
    tasks: dict[str, Task] | None = None,
) -> Evaluator:
    """What measures models of `config` with weights from `origin`. Collective; as `open_candidate`, without a model."""
    reader = open_tokenizer(models.config_with(config, tokenizer=tokenizer), origin, world)
    return Evaluator(
        exam.sets,
        exam.data,
        reader,
        models.InferenceTransform(config.preprocess),
        world,
        batch_size=exam.batch_size,
        workers=exam.data.workers,
        precision=exam.precision,
        should_stop=should_stop,
        tasks=tasks,
    )


def evaluate_checkpoint(
    checkpoint: str,
    model: str | None,
    sets: EvalConfig,
    data: DataConfig,
    world: World,
    batch_size: int = 64,
    precision: str = "fp32",
    averaged: bool = False,
    tokenizer: str | None = None,
) -> dict[str, float]:
    """The figures of all sets, under their names in `metrics.jsonl`; the same on every rank. Collective.

    Raises as `open_candidate`; a set that cannot be read is an error here.
    """
    exam = Exam(sets=sets, data=data, batch_size=batch_size, precision=precision)
    clip, evaluator = open_candidate(checkpoint, model, exam, world, averaged, tokenizer)
    figures = evaluator.evaluate_sets(clip, list(evaluator.tasks), strict=True)
    assert figures is not None, "nobody can ask for a stop here"
    return figures
