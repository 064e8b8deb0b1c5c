"""Pictures of runs: drawn from any state of metrics.jsonl."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from PIL import Image

from training.errors import ConfigError
from training.metrics import MetricsLog
from training.plots import plot_runs, read_run, smoothed


def write_run(folder: Path, steps: int = 80) -> Path:
    with MetricsLog(folder, None) as metrics:
        for step in range(1, steps + 1):
            values = {"train/loss": 5 / step, "train/lr": 1e-3, "train/logit_scale": 14.3, "train/grad_norm": 1.0}
            values |= {"train/samples_per_second": 100.0 if step > 1 else math.nan}
            metrics.write(values, step=step, epoch=0, samples_seen=step * 64)
        metrics.write({"val/demo-zeroshot-top1": 0.25}, step=steps, epoch=1, samples_seen=steps * 64)
    return folder


def test_one_run_and_several_runs_become_a_picture(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("one", "two")]
    for number, folders in enumerate((runs[:1], runs)):
        path = plot_runs(folders, tmp_path / "pictures" / f"{number}.png")
        with Image.open(path) as picture:
            assert picture.width > picture.height > 500
            assert len(picture.convert("L").getcolors() or []) > 20


def test_a_run_with_a_single_record_can_be_drawn(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "run", None) as metrics:
        metrics.write({"train/loss": 5.0}, step=1, epoch=0, samples_seen=64)
    assert plot_runs([tmp_path / "run"], tmp_path / "one.png").exists()


def test_curves_are_over_samples_seen_and_leave_out_what_is_not_finite(tmp_path: Path) -> None:
    curves = read_run(write_run(tmp_path / "run", steps=3)).curves
    assert curves["train/loss"] == ([64, 128, 192], [5.0, 2.5, 5 / 3])
    assert curves["train/samples_per_second"][0] == [128, 192]
    assert curves["val/demo-zeroshot-top1"] == ([192], [0.25])


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run folder: it has no metrics.jsonl"):
        plot_runs([tmp_path], tmp_path / "x.png")


def test_a_run_without_metrics_yet_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="holds no metrics yet"):
        plot_runs([tmp_path], tmp_path / "x.png")


def test_smoothing_keeps_length_and_mean_of_a_constant() -> None:
    assert smoothed([2.0] * 130) == pytest.approx([2.0] * 130)
    assert max(smoothed([0.0] * 60 + [1.0] + [0.0] * 60)) == pytest.approx(0.2)
