"""What a checkpoint holds: the names of its files, the texts in it, and all of it read back.

Knows neither how a folder is made safe (`training.checkpoint_files`) nor what a model is. Random numbers of a step are
drawn under the key (seed, step, rank), so their whole state is the seed and the step.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from training.checkpoint_files import verify_checkpoint
from training.errors import CheckpointError
from training.manifest import MANIFEST
from training.optimizer_state import OptimizerState
from training.secrets import mask_secrets

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
EMA_FILE = "ema.safetensors"
LORA_FILE = "lora.safetensors"
STATE_FILE = "state.json"
DATA_FILE = "data.json"
CONFIG_FILE = "config.yaml"
MODEL_CONFIG_FILE = "model_config.json"


@dataclass(frozen=True)
class Progress:
    """How far a run is: completed optimiser steps, completed epochs, samples of all ranks so far."""

    step: int = 0
    epoch: int = 0
    samples_seen: int = 0


def epoch_name(epoch: int) -> str:
    """The folder's name after `epoch` completed epochs."""
    return f"epoch_{epoch}"


def step_name(step: int) -> str:
    """The folder's name after `step` completed steps, between the ends of epochs."""
    return f"step_{step:09d}"


# ---- written


def documents(
    progress: Progress,
    data_position: Any,
    config: Mapping[str, Any],
    model_config: Mapping[str, Any],
    extra: Mapping[str, Any],
    world_size: int,
) -> dict[str, str]:
    """All texts of a checkpoint, final now: what the caller changes later must not reach the file."""
    state = {
        "progress": asdict(progress),
        "random": {"scheme": "step-keyed", "seed": config.get("seed")},
        "world_size": world_size,
        "versions": versions(),
        **extra,
    }
    return {
        STATE_FILE: json.dumps(state, indent=1),
        DATA_FILE: json.dumps(data_position),
        CONFIG_FILE: yaml.safe_dump(mask_secrets(dict(config)), sort_keys=False),
        MODEL_CONFIG_FILE: json.dumps(model_config, indent=1),
    }


@cache
def versions() -> dict[str, str]:
    """Versions of what computed the numbers."""
    try:
        own = metadata.version("clipyard")
    except metadata.PackageNotFoundError:
        own = "not installed"
    return {"clipyard": own, "torch": str(torch.__version__), "python": platform.python_version()}


# ---- read


def verify_weights(source: str) -> None:
    """Compares the weights of a checkpoint folder with its manifest; another source has none to compare with.

    Raises CheckpointError when they differ.
    """
    path = Path(source)
    folder, weights = (path.parent, path.name) if path.name in (MODEL_FILE, EMA_FILE) else (path, MODEL_FILE)
    if (folder / MANIFEST).is_file():
        verify_checkpoint(folder, only=(weights, MODEL_CONFIG_FILE))


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint's content. Tensors are mapped files: bytes are read when used, once per host for all its ranks."""

    folder: Path
    progress: Progress
    model: dict[str, Tensor]
    optimizer: OptimizerState
    data_position: Any
    state: dict[str, Any]
    config: dict[str, Any]
    model_config: dict[str, Any]
    ema: dict[str, Tensor] | None = None
    lora: dict[str, Tensor] | None = None


def load_checkpoint(folder: Path) -> LoadedCheckpoint:
    """Read a checkpoint that was found whole before; only sizes are checked again. Raises CheckpointError."""
    verify_checkpoint(folder, checksums=False)
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        return LoadedCheckpoint(
            folder=folder,
            progress=Progress(**state["progress"]),
            model=load_file(folder / MODEL_FILE),
            optimizer=load_file(folder / OPTIMIZER_FILE),
            data_position=json.loads((folder / DATA_FILE).read_text(encoding="utf-8")),
            state=state,
            config=yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8")),
            model_config=json.loads((folder / MODEL_CONFIG_FILE).read_text(encoding="utf-8")),
            ema=_load_if_there(folder / EMA_FILE),
            lora=_load_if_there(folder / LORA_FILE),
        )
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read: {type(error).__name__}: {error}") from error


def _load_if_there(path: Path) -> dict[str, Tensor] | None:
    return load_file(path) if path.exists() else None
