"""The model card: what it says of a run, what it hides, and its code, which runs as printed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models
from models.export.export import export_model
from tests.helpers.process import environment
from training.card import write_card

TARGETS = ("openclip", "transformers", "timm")


def _run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text("train_data: s3://key:hunter2@bucket/x.tar\nlr: 0.001\n")
    common = {"epoch": 1, "time": 0.0}
    lines = [
        {"step": 1, "samples_seen": 64, "train/loss": 2.0, **common},
        {"step": 2, "samples_seen": 128, "val/imagenet-zeroshot-val-top1": 0.25, **common},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_card_tells_the_run_and_hides_its_credentials(tmp_path: Path) -> None:
    config = models.load_model_config("tiny-test")
    card = write_card(tmp_path, config, 1_500_000, TARGETS, _run(tmp_path / "run")).read_text()
    for said in ("1.5 million", "Samples seen: 128", "lr: 0.001", "imagenet-zeroshot-val-top1 | 0.2500", "curves.png"):
        assert said in card
    assert "hunter2" not in card
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_weights_without_a_run_have_a_card_that_says_so(tmp_path: Path) -> None:
    card = write_card(tmp_path, models.load_model_config("tiny-test"), 1, ["timm"], None).read_text()
    assert "without the settings of their run" in card
    assert "open_clip" not in card


@pytest.mark.slow
def test_the_code_of_a_card_runs_as_printed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.create_model("tiny-test")
    export_model(model, TARGETS, tmp_path / "out")
    card = write_card(tmp_path / "out", model.config, 1, TARGETS, None).read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == len(TARGETS)
    for block in blocks:
        command = [sys.executable, "-c", block]
        ran = subprocess.run(command, cwd=tmp_path / "out", env=environment(), capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
