"""`evaluations.jsonl`: what was measured of a run's checkpoints beside its training, and so what is missing still.

One record for each set of each checkpoint, in the form of `metrics.jsonl`, with the checkpoint that it is about.
Knows neither models nor where checkpoints are. That one process writes at a time is `training.evaluation.claim`'s
business; that the figures are merged into the run's curves is `training.metrics`'s.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.checkpoint_content import EMA_FILE, MODEL_FILE
from training.errors import CheckpointError
from training.evaluation.claim import Claim
from training.manifest import Manifest
from training.metrics import EVALUATIONS_FILE, Listener, append_record, make_record, read_metrics

Key = tuple[int, float, str, str, str]


@dataclass(frozen=True)
class Measurement:
    """One set on one of a checkpoint's weights: its own, or the moving average of them.

    fingerprint: of what the set is asked with, which may change under its name.
    """

    set_name: str
    fingerprint: str = ""
    averaged: bool = False

    @property
    def file(self) -> str:
        """The weights' file in the checkpoint."""
        return EMA_FILE if self.averaged else MODEL_FILE

    def named(self, figures: Mapping[str, float]) -> dict[str, float]:
        """The figures under the names that they have in the run's curves."""
        if not self.averaged:
            return dict(figures)
        return {name.replace("val/", "val/ema/", 1): value for name, value in figures.items()}


class Ledger:
    """The file in `folder`, open for writing. Raises OSError that names it where it cannot be written.

    claim: asked before each line whether this process may still write. listener: gets a copy of each record.
    """

    def __init__(self, folder: Path, claim: Claim, listener: Listener | None = None):
        self.path = folder / EVALUATIONS_FILE
        self._claim, self._listener = claim, listener
        cut_torn_line(self.path)
        self._done = {_key_of(record) for record in read_metrics(self.path)} if self.path.exists() else set()
        self._file = self.path.open("ab", buffering=0)

    def missing(self, manifest: Manifest, wanted: Iterable[Measurement]) -> list[Measurement]:
        """What of `wanted` nobody has measured yet of the checkpoint, in the same order."""
        return [one for one in wanted if _key(manifest, one) not in self._done]

    def write(
        self, checkpoint: str, manifest: Manifest, measurement: Measurement, figures: Mapping[str, float]
    ) -> None:
        """Append what was measured, so that it outlives the machine. Raises FolderError when another one writes now."""
        self._claim.check()
        values: dict[str, Any] = {"checkpoint": checkpoint, "saved_at": manifest.written_at}
        values |= {"file": measurement.file, "weights": _digest(manifest, measurement.file)}
        values |= {"set": measurement.set_name, "prompts": measurement.fingerprint} | measurement.named(figures)
        where = {"step": manifest.step, "epoch": manifest.epoch, "samples_seen": manifest.samples_seen}
        record = make_record(values, **where)
        append_record(self._file, self.path, record)
        os.fsync(self._file.fileno())
        self._done.add(_key(manifest, measurement))
        if self._listener is not None:
            self._listener.write(record)

    def close(self) -> None:
        self._file.close()


def _key(manifest: Manifest, measurement: Measurement) -> Key:
    """A step that was made anew has other weights: when they were saved tells them apart."""
    return manifest.step, manifest.written_at, measurement.file, measurement.set_name, measurement.fingerprint


def _key_of(record: Mapping[str, Any]) -> Key:
    file, set_name, prompts = (str(record.get(field, "")) for field in ("file", "set", "prompts"))
    return record["step"], record.get("saved_at", 0.0), file, set_name, prompts


def _digest(manifest: Manifest, file: str) -> str:
    """The checksum that the checkpoint was verified by. Raises CheckpointError where there is no such file."""
    if file not in manifest.files:
        raise CheckpointError(f"the checkpoint of step {manifest.step} has no {file}")
    return f"crc32:{manifest.files[file].crc32:08x}"


def cut_torn_line(path: Path) -> None:
    """A kill in the middle of a write leaves a line without its end: what is behind the last whole one goes."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
            os.fsync(file.fileno())
