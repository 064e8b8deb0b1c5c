"""What a run has shown so far, to hold against its forecast. Reads a run folder; builds nothing."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import yaml

from training.errors import ConfigError
from training.forecast.prediction import Forecast
from training.metrics import FILE_NAME, read_metrics

_SPEED, _SPEED_PER_GPU = "train/samples_per_second", "train/samples_per_second_per_gpu"
_DATA, _STEP = "train/data_time", "train/batch_time"


@dataclass(frozen=True)
class Pace:
    """samples_per_second and data_share (of a step, waiting for data): medians of the records after the first."""

    num_records: int
    num_gpus: int
    samples_seen: int
    samples_per_second: float
    data_share: float


def settings_of(run: Path) -> dict[str, object]:
    """The flat settings that a run was started with. Raises ConfigError where there is no run."""
    path = run / "config.yaml"
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"--run {run}: {path.name} cannot be read: {error.strerror}") from None


def pace_of(run: Path) -> Pace:
    """Raises ConfigError for a run without records of training beyond its first step."""
    path = run / FILE_NAME
    records = [record for record in read_metrics(path) if _SPEED in record] if path.is_file() else []
    # The first record is that of the first step, with compilation and cold caches in it.
    steady = records[1:]
    if not steady:
        raise ConfigError(f"--run {run}: {FILE_NAME} has no record of training after the first step yet")
    last = steady[-1]
    return Pace(
        num_records=len(steady),
        num_gpus=round(last[_SPEED] / last[_SPEED_PER_GPU]),
        samples_seen=last["samples_seen"],
        samples_per_second=statistics.median(record[_SPEED] for record in steady),
        data_share=statistics.median(record[_DATA] / record[_STEP] for record in steady),
    )


def seconds_left(pace: Pace, total_samples: int) -> float:
    """Until `total_samples`, at the pace so far."""
    return max(0, total_samples - pace.samples_seen) / pace.samples_per_second


def utilisation(pace: Pace, forecast: Forecast, stated: float) -> float:
    """Of the GPUs' peak, by the run's pace: the forecast's rate is proportional to what was stated."""
    return stated * pace.samples_per_second / forecast.samples_per_second
