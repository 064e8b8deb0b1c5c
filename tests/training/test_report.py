"""What steps leave behind as records: their times are those of steps alone."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from training.console import Console
from training.distributed import World
from training.metrics import MetricsLog
from training.plan import Plan
from training.report import Reporter
from training.step import StepResult

PLAN = Plan(1, 8, 1, samples_per_epoch=800, epochs=1, warmup_steps=0)
FEED: Any = SimpleNamespace(data_time_s=0.01, metrics=dict)


def result_of() -> StepResult:
    zero = torch.zeros(())
    return SimpleNamespace(loss=zero, losses={}, scale=zero, grad_norm=zero)  # type: ignore[return-value]


@pytest.mark.parametrize("evaluated_at", [10, 14])
def test_an_evaluation_counts_neither_for_the_steps_around_it_nor_for_their_data(
    tmp_path: Path, evaluated_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with MetricsLog(tmp_path, None) as metrics, Console("lines", PLAN.total_steps) as console:
        reporter = Reporter(metrics, console, PLAN, World(), every=10)
        for done in range(1, 21):
            now[0] += 0.5
            reporter.step(done, result_of(), 0.0, FEED)
            if done == evaluated_at:
                with reporter.pause(done):
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
