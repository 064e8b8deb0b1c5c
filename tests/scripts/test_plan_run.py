"""`scripts.plan_run`: what it prints, what it compares with, and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from scripts.plan_run import main
from training.config import DataConfig, ModelConfig, OptimConfig, TrainConfig, to_flat

FLAGS = ["--", "--model", "convnext_large_d_320", "--grad-checkpointing", "--batch-size", "128", "--epochs", "12"]


def test_a_plan_tells_memory_time_traffic_and_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpu", "a100-40", "--gpus", "512", *FLAGS, "--train-num-samples", "200000000"]) == 0
    out = capsys.readouterr().out
    for said in (
        "model: convnext_large_d_320, 351.77 M parameters",
        "cluster: 512 a100-40 in 64 nodes",
        "128 per rank x 512 ranks = 65536 samples a step",
        "GiB: weights 1.3, gradients 1.3, moments 2.6, activations",
        "samples/s at the stated 30.0% of 312 TFLOP/s",
        "GPU-hours; 2.40 G samples",
        "GB/s from storage",
        "checkpoint: 4.2 GB each",
    ):
        assert said in out


def test_what_does_not_fit_ends_with_2_and_says_what_to_lower(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--", "--model", "ViT-L-14", "--batch-size", "512", "--train-num-samples", "10000000"]
    assert main(["--gpu", "a100-40", "--gpus", "8", *flags]) == 2
    out = capsys.readouterr().out
    assert "too much" in out and "it does not fit: lower --batch-size, or add --grad-checkpointing or --fsdp" in out


def _run(folder: Path, speeds: list[float]) -> Path:
    config = TrainConfig(
        data=DataConfig(train_num_samples=100_000),
        model=ModelConfig(model="ViT-B-32"),
        optim=OptimConfig(batch_size=64, epochs=10),
    )
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(to_flat(config)))
    lines = [
        {
            "step": step,
            "epoch": 0,
            "samples_seen": 512 * step,
            "time": 0.0,
            "train/samples_per_second": speed,
            "train/samples_per_second_per_gpu": speed / 8,
            "train/data_time": 0.1,
            "train/batch_time": 1.0,
        }
        for step, speed in enumerate(speeds, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_is_held_against_its_forecast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", str(_run(tmp_path / "run", [3.0, 4000.0, 6000.0, 5000.0]))]) == 0
    out = capsys.readouterr().out
    assert "cluster: 8 a100-80" in out
    assert "run: 5,000 samples/s, the median of 3 records after the first step" in out
    assert "10% of a step waiting for data" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (FLAGS, "--gpus is needed"),
        (["--gpus", "8", *FLAGS], "--train-num-samples is needed"),
        (["--gpus", "8", "--gpu", "tpu"], "invalid choice: 'tpu'"),
        (["--gpus", "8", "--model", "x"], "flags of training.main stand behind --"),
        (["--gpus", "8", "--", "--model", "ViT-X", "--train-num-samples", "9999"], "unknown model 'ViT-X'"),
        (["--run", "absent"], "has no record of training after the first step yet"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
