"""A run's time, split: nothing is counted twice, and what lies between jobs is no computing."""

from __future__ import annotations

from typing import Any

import pytest

from training.run_report.times import split_times


def _record(step: int, now: float, job_s: float, **times: float) -> dict[str, Any]:
    values = {"checkpoint_time": 0.0, "evaluation_time": 0.0, "job_time": job_s} | times
    return {"step": step, "time": now, **{f"train/{name}": value for name, value in values.items()}}


def _two_jobs() -> list[dict[str, Any]]:
    """A job of 100 s with 10 steps and an evaluation; a wait of 1000 s; a job of 60 s with 5 steps and a checkpoint."""
    return [
        _record(10, 1090.0, 90.0, batch_time=7.0, data_time=2.0, window_steps=10),
        {**_record(10, 1100.0, 100.0, evaluation_time=10.0), "val/clip_val_loss": 1.0},
        _record(15, 2160.0, 60.0, batch_time=8.0, data_time=0.0, window_steps=5, checkpoint_time=4.0),
    ]


def test_the_parts_are_what_the_records_say() -> None:
    times = split_times(_two_jobs())
    assert times is not None
    assert (times.data_s, times.compute_s) == (20.0, 50.0 + 40.0)
    assert (times.checkpoint_s, times.evaluation_s) == (4.0, 10.0)
    assert times.startup_s == pytest.approx((90 - 70) + (60 - 40 - 4))
    assert times.num_jobs == 2 and times.pauses_known


def test_the_wait_between_two_jobs_is_other_time() -> None:
    times = split_times(_two_jobs())
    assert times is not None
    assert times.total_s == 1160.0
    assert times.other_s == pytest.approx(1000.0)


def test_a_job_whose_clock_is_further_on_than_the_last_jobs_is_another_one_all_the_same() -> None:
    records = [
        _record(1, 1010.0, 10.0, batch_time=1.0, data_time=0.0, window_steps=1),
        _record(2, 5300.0, 300.0, batch_time=1.0, data_time=0.0, window_steps=1),
    ]
    times = split_times(records)
    assert times is not None and times.num_jobs == 2
    assert times.startup_s == pytest.approx(9 + 299)


def test_evaluations_by_a_companion_do_not_stretch_the_run() -> None:
    companion = {"step": 15, "time": 9999.0, "val/demo-zeroshot-top1": 0.5}
    assert split_times([*_two_jobs(), companion]) == split_times(_two_jobs())


def test_records_without_clocks_are_split_as_far_as_they_go() -> None:
    records = [
        {"step": step, "time": 100.0 + step, "train/batch_time": 1.0, "train/data_time": 0.25} for step in (1, 5, 10)
    ]
    times = split_times(records)
    assert times is not None and not times.pauses_known
    assert (times.data_s, times.compute_s, times.num_jobs) == (2.5, 7.5, 1)
    assert times.total_s == 10.0 and times.other_s == 0.0


def test_a_run_without_a_step_has_no_times() -> None:
    assert split_times([{"step": 0, "time": 1.0, "val/clip_val_loss": 1.0}]) is None
