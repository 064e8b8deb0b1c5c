"""`--text-padding` in whole runs: the same curve either way, and a refusal before anything is spent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import models
from models.text import TextLayers
from training.main import main

FLAGS = [
    *("--model", "tiny-test", "--precision", "fp32", "--device", "cpu", "--batch-size", "8", "--workers", "0"),
    *("--epochs", "1", "--warmup", "2", "--lr", "1e-3", "--log-every-n-steps", "1", "--progress", "lines"),
    *("--dataset-type", "synthetic", "--train-num-samples", "32", "--no-preflight"),
]


def _losses(logs: Path, choice: str) -> list[float]:
    assert main([*FLAGS, "--logs", str(logs), "--name", choice, "--text-padding", choice]) == 0
    lines = [json.loads(line) for line in (logs / choice / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_losses_without_padding_are_those_with_it(tmp_path: Path) -> None:
    assert _losses(tmp_path, "cut") == pytest.approx(_losses(tmp_path, "full"), rel=1e-5)


def test_padding_is_cut_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[models.TextPlan] = []
    plan_text = TextLayers.plan_text
    monkeypatch.setattr(TextLayers, "plan_text", lambda *args: (plans.append(plan_text(*args)), plans[-1])[1])
    assert main([*FLAGS, "--logs", str(tmp_path), "--name", "run"]) == 0
    assert len(plans) == 4  # one a step
    assert main([*FLAGS, "--logs", str(tmp_path), "--name", "full", "--text-padding", "full"]) == 0
    assert len(plans) == 4


def test_cutting_where_it_is_not_exact_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = models.load_model_config("tiny-test").to_dict()
    raw["text_cfg"]["no_causal_mask"] = True
    path = tmp_path / "bidirectional.yaml"
    path.write_text(yaml.safe_dump(raw))
    flags = [*FLAGS, "--logs", str(tmp_path), "--model", str(path)]
    assert main([*flags, "--name", "refused", "--text-padding", "cut"]) == 2
    assert "--text-padding cut" in caplog.text
    assert "no causal mask" in caplog.text
    assert main([*flags, "--name", "padded"]) == 0
    assert "padding is computed too" in (tmp_path / "padded" / "train.log").read_text()
