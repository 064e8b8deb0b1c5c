"""Whole runs with the sigmoid loss and with a teacher: what they write, and that they resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from tests.helpers.shards import write_shards
from training.main import main

FLAGS = [
    *("--model", "tiny-test", "--precision", "fp32", "--device", "cpu", "--batch-size", "8", "--workers", "0"),
    *("--epochs", "1", "--warmup", "1", "--lr", "1e-3", "--log-every-n-steps", "1", "--progress", "lines"),
]


def _run(tmp_path: Path, *flags: str, name: str = "run") -> int:
    if not (tmp_path / "shards").exists():
        write_shards(tmp_path / "shards", [16, 16])
    data = f"{tmp_path / 'shards'}/shard-{{00000..00001}}.tar"
    return main([*FLAGS, "--train-data", data, "--logs", str(tmp_path / "logs"), "--name", name, *flags])


def _records(tmp_path: Path, name: str = "run") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "logs" / name / "metrics.jsonl").read_text().splitlines()]


def _weights(tmp_path: Path, name: str = "run") -> dict[str, torch.Tensor]:
    return load_file(tmp_path / "logs" / name / "checkpoints" / "epoch_1" / "model.safetensors")


def test_siglip_starts_from_its_own_temperature_and_trains_its_bias(tmp_path: Path) -> None:
    assert _run(tmp_path, "--siglip", "--loss-dist-impl", "gather", "--accum-freq", "2") == 0
    first = _records(tmp_path)[0]
    assert first["train/logit_scale"] == pytest.approx(10, rel=1e-2)
    assert first["train/loss"] == first["train/contrastive_loss"]
    bias = float(_weights(tmp_path)["logit_bias"])
    assert bias != -10 and bias == pytest.approx(-10, abs=0.1)


def test_a_distilled_run_reports_its_parts_and_keeps_the_teacher_out_of_its_checkpoints(tmp_path: Path) -> None:
    torch.manual_seed(1)
    teacher = models.build_model(models.load_model_config("tiny-test"))
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    flags = ["--distill-model", "tiny-test", "--distill-pretrained", str(tmp_path / "teacher.safetensors")]
    assert _run(tmp_path, *flags) == 0
    records = [r for r in _records(tmp_path) if "train/loss" in r]
    assert len(records) == 4
    for record in records:
        parts = record["train/contrastive_loss"] + record["train/distill_loss"]
        assert record["train/loss"] == pytest.approx(parts, rel=1e-6)
    assert _weights(tmp_path).keys() == teacher.state_dict().keys()
    # Stopped after two steps and resumed, it ends with the same weights.
    assert _run(tmp_path, *flags, "--stop-after-steps", "2", name="again") == 75
    assert _run(tmp_path, *flags, "--resume", "latest", name="again") == 0
    first, second = _weights(tmp_path), _weights(tmp_path, "again")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_model_that_writes_captions_trains_evaluates_and_resumes(tmp_path: Path) -> None:
    flags = ["--model", "tiny-test-coca", "--val-data", f"{tmp_path / 'shards'}/shard-00000.tar"]
    assert _run(tmp_path, *flags, "--coca-caption-loss-weight", "0.5") == 0
    records = [r for r in _records(tmp_path) if "train/loss" in r]
    for record in records:
        parts = record["train/contrastive_loss"] + record["train/caption_loss"]
        assert record["train/loss"] == pytest.approx(parts, rel=1e-6)
    # Half of the mean over tokens, each about one of the whole vocabulary.
    assert records[0]["train/caption_loss"] == pytest.approx(0.5 * math.log(49_408), rel=0.05)
    assert any("val/image_to_text_R@1" in record for record in _records(tmp_path))
    assert _run(tmp_path, *flags, "--coca-caption-loss-weight", "0.5", "--stop-after-steps", "2", name="again") == 75
    assert _run(tmp_path, *flags, "--coca-caption-loss-weight", "0.5", "--resume", "latest", name="again") == 0
    first, second = _weights(tmp_path), _weights(tmp_path, "again")
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "tiny-test-coca", "--accum-freq", "2"], "--accum-freq with tiny-test-coca is refused"),
        (["--distill-model", "tiny-test"], "--distill-pretrained go together"),
        (["--distill-model", "tiny-test", "--distill-pretrained", "x", "--siglip"], "--siglip with --distill-model"),
        (["--loss-dist-impl", "ring"], "'ring' is not one of bidir, shift, reduce, gather"),
        (["--distill-model", "tiny-tset", "--distill-pretrained", "x"], "unknown model 'tiny-tset'"),
    ],
)
def test_what_does_not_go_together_is_a_mistake_of_the_command_line(
    tmp_path: Path, flags: list[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert _run(tmp_path, *flags) == 2
    assert message in caplog.text
