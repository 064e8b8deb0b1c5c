"""The model card: what it says of a run, what it hides, and its code, which runs as printed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models
from models.export import export_model
from tests.helpers.process import environment
from tests.helpers.shards import write_shards
from training.card import command_of, write_card
from training.cli import parse_args
from training.config import to_flat
from training.main import main

TARGETS = ("openclip", "transformers", "timm", "onnx")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs that was evaluated after each."""
    folder = tmp_path_factory.mktemp("run")
    write_shards(folder / "shards", [16])
    data = f"{folder / 'shards'}/shard-00000.tar"
    flags = ["--model", "tiny-test", "--precision", "fp32", "--device", "cpu", "--batch-size", "8", "--workers", "0"]
    flags += ["--epochs", "2", "--warmup", "1", "--train-data", data, "--val-data", data, "--logs", str(folder)]
    assert main([*flags, "--name", "run", "--lr", "1e-3", "--aug-cfg", "scale=(0.5, 1.0)", "--progress", "lines"]) == 0
    return folder / "run"


def _card(out: Path, checkpoint: Path | None) -> str:
    return write_card(out, models.load_model_config("tiny-test"), 1_500_000, TARGETS, checkpoint).read_text()


def test_a_card_tells_of_the_run_up_to_its_checkpoint(run: Path, tmp_path: Path) -> None:
    first, last = (_card(tmp_path, run / "checkpoints" / name) for name in ("epoch_1", "epoch_2"))
    for said in (
        "1.5 million",
        "| global batch | 8 on 1 GPUs |",
        "| peak learning rate | 0.001, cosine |",
        "shard-00000",
    ):
        assert said in first
    assert "| samples seen | 16 |" in first and "| samples seen | 32 |" in last
    pattern = r"\| clip_val_loss \| (\S+) \|"
    losses = [re.findall(pattern, card) for card in (first, last)]
    assert [len(found) for found in losses] == [1, 1] and losses[0] != losses[1]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_card_holds_what_was_measured_beside_the_run_up_to_its_checkpoint(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    measured = ({"step": step, "samples_seen": step * 8, "val/shapes-zeroshot-top1": step / 8} for step in (2, 4))
    (copy / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in measured))
    first, last = (_card(tmp_path, copy / "checkpoints" / name) for name in ("epoch_1", "epoch_2"))
    assert "| shapes-zeroshot-top1 | 0.2500 |" in first and "| shapes-zeroshot-top1 | 0.5000 |" in last


def test_its_command_gives_the_same_settings_again(run: Path) -> None:
    given = ["--model", "ViT-H-14", "--train-data", "s3://b/{0..9}.tar", "--train-num-samples", "10", "--lr", "2e-3"]
    given += ["--dataset-resampled", "--no-preflight", "--aug-cfg", "scale=(0.5, 1.0)", "re_prob=0.4", "--local-loss"]
    config = parse_args(given)
    command = command_of(to_flat(config))
    assert command.startswith("python -m training.main \\\n    --train-data 's3://b/{0..9}.tar'")
    assert parse_args(shlex.split(command.replace("\\\n", ""))[3:]) == config


def test_its_command_has_no_credentials() -> None:
    settings = to_flat(parse_args(["--train-data", "s3://key:hunter2@bucket/x.tar", "--train-num-samples", "9"]))
    assert "hunter2" not in command_of(settings)
    assert "bucket/x.tar" in command_of(settings)


def test_weights_without_a_run_have_a_card_that_says_so(tmp_path: Path) -> None:
    card = write_card(tmp_path, models.load_model_config("tiny-test"), 1, ["timm"], None).read_text()
    assert "without the settings of their run" in card and "Not evaluated during training" in card
    assert "open_clip" not in card and "curves.png" not in card


@pytest.mark.slow
def test_the_code_of_a_card_runs_as_printed(run: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.create_model("tiny-test")
    export_model(model, TARGETS, tmp_path / "out")
    card = _card(tmp_path / "out", run / "checkpoints" / "epoch_2")
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == len(TARGETS)
    for block in blocks:
        command = [sys.executable, "-c", block]
        ran = subprocess.run(command, cwd=tmp_path / "out", env=environment(), capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
