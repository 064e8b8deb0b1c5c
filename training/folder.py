"""The folder of a run: its name, its files, and what of an earlier run is in it. Written on rank 0 only."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import yaml

from training.config import TrainConfig, to_flat
from training.distributed import World
from training.errors import ConfigError, FolderError
from training.secrets import mask_secrets

# What is wrong with the file system and not with the path: a node's fault, which another node may not have.
_MAY_PASS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run: `<logs>/<name>/` with config.yaml, metrics.jsonl, train.log, checkpoints/."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where checkpoint folders are."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The run's numbers, one object a line."""
        return self.path / "metrics.jsonl"

    def create(self, config: TrainConfig) -> None:
        """Make the folder and write the resolved configuration. Raises FolderError, or ConfigError where
        another try would not help either.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            temporary = self.path / "config.yaml.tmp"
            temporary.write_text(yaml.safe_dump(plain(mask_secrets(to_flat(config))), sort_keys=False))
            os.replace(temporary, self.path / "config.yaml")
        except OSError as error:
            kind = FolderError if error.errno in _MAY_PASS else ConfigError
            raise kind(f"the run folder {self.path} cannot be written: {error.strerror}") from error


def run_folder(config: TrainConfig, world: World) -> RunFolder:
    """The same folder on every rank: a name made from the date is rank 0's."""
    name = config.run.name or world.broadcast_object(_dated_name(config))
    if Path(name).name != name:
        raise ConfigError(f"--name {name!r} is not a plain folder name; --logs says where run folders are")
    return RunFolder(Path(config.run.logs) / name)


def _dated_name(config: TrainConfig) -> str:
    """OpenCLIP's form: date, model, rate, batch, workers, precision."""
    model = Path(config.model.model).stem.replace("/", "-")
    parts = [
        datetime.now().strftime("%Y_%m_%d-%H_%M_%S"),
        f"model_{model}",
        f"lr_{config.optim.lr:g}",
        f"b_{config.optim.batch_size}",
        f"j_{config.data.workers}",
        f"p_{config.model.precision}",
    ]
    return "-".join(parts)


def plain(values: dict[str, object]) -> dict[str, object]:
    """Tuples as lists: YAML has no tuples."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
