"""Times in the records: what training stands still for is no step's time, and is told by the next record."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from training.config import OptimConfig
from training.console import Console
from training.distributed import World
from training.metrics import MetricsLog, read_metrics
from training.plan import make_plan
from training.report import Reporter

PAUSE_S = 0.2
RESULT: Any = SimpleNamespace(loss=1.0, losses={}, scale=14.0, grad_norm=1.0)
FEED: Any = SimpleNamespace(data_time_s=0.0, metrics=dict)


@pytest.fixture
def records(tmp_path: Path) -> list[dict[str, Any]]:
    """Steps 1 and 2, a checkpoint, step 3, an evaluation with figures, step 4; a record every second step."""
    plan = make_plan(OptimConfig(batch_size=1, epochs=1, warmup=0), 4, 1)
    with MetricsLog(tmp_path, None) as metrics, Console("lines", plan.total_steps, 0, is_main=False) as console:
        reporter = Reporter(metrics, console, plan, World(), every=2, job_time=lambda: 77.0)
        for step in (1, 2, 3):
            reporter.step(step, RESULT, 0.1, FEED)
            if step == 2:
                with reporter.pause("checkpoint"):
                    time.sleep(PAUSE_S)
        with reporter.pause("evaluation"):
            time.sleep(PAUSE_S)
        reporter.evaluation(3, {"val/clip_val_loss": 1.0})
        reporter.step(4, RESULT, 0.1, FEED)
    return list(read_metrics(tmp_path / "metrics.jsonl"))


def test_a_pause_is_in_the_record_behind_it_and_in_no_other(records: list[dict[str, Any]]) -> None:
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    checkpoints = [record["train/checkpoint_time"] for record in records]
    evaluations = [record["train/evaluation_time"] for record in records]
    assert [seconds >= PAUSE_S for seconds in checkpoints] == [False, False, True, False]
    assert [seconds >= PAUSE_S for seconds in evaluations] == [False, False, True, False]
    assert {record["train/job_time"] for record in records} == {77.0}


def test_a_pause_is_no_step_time_though_it_is_in_the_middle_of_a_window(records: list[dict[str, Any]]) -> None:
    last = records[-1]
    assert last["train/window_steps"] == 2
    assert 0 <= last["train/batch_time"] < PAUSE_S / 2
