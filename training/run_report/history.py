"""What the files of a run say of it: how far it is, whether it goes on, and what was measured. Knows no HTML."""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from training.console import LOG_FILE
from training.errors import ConfigError
from training.metrics import FILE_NAME, read_records
from training.plots import Run, curves_of
from training.secrets import mask_secrets, mask_text

COMPLETE, RUNNING, STOPPED = "complete", "running", "stopped"
_PLAN = re.compile(r" plan: .* = (\d+) steps$", re.MULTILINE)
_LOGGED = re.compile(r"^\d{4}-\d\d-\d\d \S+ (?P<level>[A-Z]+) [\w.]+: (?P<text>.*)$", re.MULTILINE)
_LOG_TAIL_BYTES = 1 << 20
# A run that is silent for this long, or for many times its usual pause, is not taken for a running one.
_SILENT_S = 600.0
_SILENT_PAUSES = 4
_LOWER_IS_BETTER = ("loss", "_rank")
_NO_FIGURES = ("num_samples", "num_captions", "num_classes", "strength")


@dataclass(frozen=True)
class History:
    """A run's records in their order, its settings with secrets masked, and the end of its log."""

    name: str
    folder: Path
    records: tuple[dict[str, Any], ...]
    settings: dict[str, Any]
    log: str
    written_at: float  # unix seconds: when the run last left a sign

    @property
    def curves(self) -> Run:
        """What is drawn of it."""
        return Run(self.name, curves_of(self.records))

    @property
    def training(self) -> list[dict[str, Any]]:
        """The records of steps."""
        return [record for record in self.records if "train/batch_time" in record]

    @property
    def last(self) -> dict[str, Any]:
        """The newest record of the furthest step."""
        return max(self.records, key=lambda record: (record["step"], record["time"]))

    @property
    def num_ranks(self) -> int | None:
        """Ranks at the last step."""
        speeds = [
            (record["train/samples_per_second"], record["train/samples_per_second_per_gpu"])
            for record in self.training
            if record.get("train/samples_per_second") and record.get("train/samples_per_second_per_gpu")
        ]
        return round(speeds[-1][0] / speeds[-1][1]) if speeds else None

    @property
    def total_steps(self) -> int | None:
        """As the log's last plan has it."""
        plans = _PLAN.findall(self.log)
        return int(plans[-1]) if plans else None

    @property
    def last_words(self) -> tuple[str, str] | None:
        """Level and text of the log's last line."""
        lines = list(_LOGGED.finditer(self.log))
        return (lines[-1]["level"], lines[-1]["text"]) if lines else None

    def state(self, now: float | None = None) -> str:
        """Whether the run is complete, running or stopped, as far as its files tell."""
        level, text = self.last_words or ("", "")
        if level == "INFO" and text.startswith(("done", "the run is complete")):
            return COMPLETE
        if level in ("ERROR", "CRITICAL") or text.startswith("stopped"):
            return STOPPED
        silent_s = (time.time() if now is None else now) - self.written_at
        return RUNNING if silent_s < max(_SILENT_S, _SILENT_PAUSES * self._usual_pause_s()) else STOPPED

    def _usual_pause_s(self) -> float:
        """The longest of the last pauses between records of training; evaluations beside it have other hours."""
        times = [record["time"] for record in self.records if "train/loss" in record][-20:]
        return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)


@dataclass(frozen=True)
class Measured:
    """One figure in the course of a run: (samples seen, value) of its last and its best evaluation."""

    name: str
    last: tuple[int, float]
    best: tuple[int, float]
    num_evaluations: int


def read_history(folder: Path) -> History:
    """Raises ConfigError for a folder that holds no metrics, or settings that are none."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no {FILE_NAME}")
    records = tuple(read_records(folder))
    if not records:
        raise ConfigError(f"{path} holds no metrics yet")
    log = folder / LOG_FILE
    signs = [file.stat().st_mtime for file in (path, log) if file.is_file()]
    return History(folder.resolve().name, folder, records, _read_settings(folder), _read_end(log), max(signs))


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected a mapping of setting names to values")
    return dict(mask_secrets(settings))


def _read_end(path: Path) -> str:
    """The last part of a log that may be long, without secrets."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
        return mask_text(file.read().decode(errors="replace"))


def measured(records: Iterable[Mapping[str, Any]]) -> list[Measured]:
    """The figures of all evaluations in the order of their names, those of averaged weights last."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in record.items():
            is_figure = name.startswith("val/") and not name.endswith(_NO_FIGURES)
            if is_figure and isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, []).append((record["samples_seen"], value))
    return [
        Measured(name, values[-1], _best(name, values), len(values))
        for name, values in sorted(found.items(), key=_in_order)
    ]


def _in_order(item: tuple[str, Any]) -> tuple[bool, str]:
    return item[0].startswith("val/ema/"), item[0]


def _best(name: str, values: list[tuple[int, float]]) -> tuple[int, float]:
    choose = min if name.endswith(_LOWER_IS_BETTER) else max
    return choose(values, key=lambda point: point[1])
