"""Where a run's time went, from its records. Pure; knows no HTML.

Each job of a run has its own clock, `train/job_time`; what no job accounts for lies between them, or was lost with the
steps that a resume made again. Waits for data are those of rank 0: others' look like computing there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# The clocks of two jobs are apart by at least a start; a clock that is set right moves by less.
_APART_S = 5.0
_PAUSES = ("checkpoint", "evaluation")


@dataclass(frozen=True)
class TimeSplit:
    """Seconds of the whole run, from the start of its first job to its last record.

    pauses_known: False for records without the times of checkpoints and evaluations, which are in `other_s` then.
    """

    data_s: float
    compute_s: float
    checkpoint_s: float
    evaluation_s: float
    startup_s: float
    total_s: float
    num_jobs: int
    pauses_known: bool

    @property
    def other_s(self) -> float:
        """Between jobs, lost with repeated steps, or behind a job's last record."""
        known = self.data_s + self.compute_s + self.checkpoint_s + self.evaluation_s + self.startup_s
        return max(0.0, self.total_s - known)


def split_times(records: Sequence[Mapping[str, Any]]) -> TimeSplit | None:
    """None for a run without records of training."""
    own = [record for record in records if any(name.startswith("train/") for name in record)]
    steps = [record for record in own if "train/batch_time" in record]
    if not steps:
        return None
    counts = _window_steps(steps)
    data_s = sum(_value(record, "data_time") * num for record, num in zip(steps, counts, strict=True))
    whole_s = sum(_value(record, "batch_time") * num for record, num in zip(steps, counts, strict=True))
    paused_s = [sum(_value(record, f"{kind}_time") for record in own) for kind in _PAUSES]
    jobs = list(_first_records(own))
    began = own[0]["time"] - (_value(own[0], "job_time") or _value(own[0], "batch_time") * counts[0])
    return TimeSplit(
        data_s=data_s,
        compute_s=max(0.0, whole_s - data_s),
        checkpoint_s=paused_s[0],
        evaluation_s=paused_s[1],
        startup_s=sum(_startup_s(record) for record in jobs),
        total_s=max(record["time"] for record in own) - began,
        num_jobs=len(jobs),
        pauses_known=all("train/checkpoint_time" in record for record in steps),
    )


def _window_steps(steps: Sequence[Mapping[str, Any]]) -> list[int]:
    """How many steps each record's means are over."""
    before = [0, *(record["step"] for record in steps)]
    return [
        int(record.get("train/window_steps", record["step"] - earlier))
        for record, earlier in zip(steps, before, strict=False)
    ]


def _first_records(own: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """The first record of each job; without clocks, of the only job that can be told."""
    last: Mapping[str, Any] | None = None
    for record in own:
        if last is None or ("train/job_time" in record and _is_another_job(last, record)):
            yield record
        last = record if last is None or "train/job_time" in record else last


def _is_another_job(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> bool:
    if _value(later, "job_time") < _value(earlier, "job_time"):
        return True
    began = [record["time"] - _value(record, "job_time") for record in (earlier, later)]
    return began[1] - began[0] > _APART_S


def _startup_s(first: Mapping[str, Any]) -> float:
    """From the beginning of a job to the beginning of its first step."""
    stepped_s = _value(first, "batch_time") * _value(first, "window_steps")
    paused_s = sum(_value(first, f"{kind}_time") for kind in _PAUSES)
    return max(0.0, _value(first, "job_time") - stepped_s - paused_s)


def _value(record: Mapping[str, Any], name: str) -> float:
    return float(record.get(f"train/{name}") or 0.0)
