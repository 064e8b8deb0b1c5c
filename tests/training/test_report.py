"""Times in the records: what training stands still for is no step's time, and is told by the next record."""

from __future__ import annotations

import json
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
FEED: Any = SimpleNamespace(data_time_s=0.01, metrics=dict)


@pytest.fixture
def records(tmp_path: Path) -> list[dict[str, Any]]:
    """Steps 1 and 2, a checkpoint, step 3, an evaluation with figures, step 4; a record every second step."""
    plan = make_plan(OptimConfig(batch_size=1, epochs=1, warmup=0), 4, 1)
    with MetricsLog(tmp_path, None) as metrics, Console("lines", plan.total_steps, 0, is_main=False) as console:
        reporter = Reporter(metrics, console, plan, World(), every=2, job_time=lambda: 77.0)
        for step in (1, 2, 3):
            reporter.step(step, RESULT, 0.1, FEED)
            if step == 2:
                with reporter.pause("checkpoint", step):
                    time.sleep(PAUSE_S)
        with reporter.pause("evaluation", 3):
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


@pytest.mark.parametrize("evaluated_at", [10, 14])
def test_an_evaluation_counts_neither_for_the_steps_around_it_nor_for_their_data(
    tmp_path: Path, evaluated_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(OptimConfig(batch_size=8, epochs=1, warmup=0), 800, 1)
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with MetricsLog(tmp_path, None) as metrics, Console("lines", plan.total_steps) as console:
        reporter = Reporter(metrics, console, plan, World(), every=10, job_time=lambda: 77.0)
        for done in range(1, 21):
            now[0] += 0.5
            reporter.step(done, RESULT, 0.0, FEED)
            if done == evaluated_at:
                with reporter.pause("evaluation", done):
                    now[0] += 600.0
                reporter.evaluation(done, {"val/top1": 0.5})
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = {record["step"]: record for record in records if "train/loss" in record}
    assert list(steps) == [1, 10, 20]
    for record in steps.values():
        assert record["train/batch_time"] == pytest.approx(0.5)
        assert record["train/samples_per_second"] == pytest.approx(16)
        assert record["train/data_time"] == pytest.approx(0.01)
    assert [record["step"] for record in records if "val/top1" in record] == [evaluated_at]
