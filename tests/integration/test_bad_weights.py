"""Bad weights at the entries of a run and of an evaluation: one line that names them, no code run, nothing trained."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import evaluate
from tests.helpers.shards import write_shards
from training.errors import EXIT_CONFIG
from training.main import main

TINY = ["--model", "tiny-test", "--precision", "fp32", "--device", "cpu", "--batch-size", "4", "--workers", "0"]


class Malicious:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def _flags(folder: Path, name: str, *more: str) -> list[str]:
    data = ["--train-data", str(folder / "data"), "--epochs", "1", "--warmup", "1"]
    return [*TINY, *data, "--logs", str(folder / "logs"), "--name", name, *more]


def _errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


def test_a_file_with_code_is_refused_by_training_teaching_and_evaluation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "data", [8])
    evil, canary = str(tmp_path / "evil.pt"), tmp_path / "canary"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "extra": Malicious(canary)}, evil)
    assert main(_flags(tmp_path, "a", "--pretrained", evil)) == EXIT_CONFIG
    assert main(_flags(tmp_path, "b", "--distill-model", "tiny-test", "--distill-pretrained", evil)) == EXIT_CONFIG
    errors = _errors(caplog)
    assert errors and all(f"{evil} is refused" in error and "\n" not in error for error in errors)
    flags = ["--checkpoint", evil, "--model", "tiny-test", "--val-data", str(tmp_path / "data"), "--device", "cpu"]
    assert evaluate.main(flags) == EXIT_CONFIG
    assert f"{evil} is refused" in capsys.readouterr().err
    assert not canary.exists()


def test_a_flipped_bit_in_a_runs_own_checkpoint_is_named_and_nothing_is_trained_on_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "data", [8])
    assert main(_flags(tmp_path, "first")) == 0
    folder = tmp_path / "logs" / "first" / "checkpoints" / "epoch_1"
    assert main(_flags(tmp_path, "second", "--pretrained", str(folder))) == 0
    shutil.copytree(folder, tmp_path / "epoch_1")
    weights = tmp_path / "epoch_1" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 0x01
    weights.write_bytes(content)
    assert main(_flags(tmp_path, "third", "--pretrained", str(tmp_path / "epoch_1"))) == EXIT_CONFIG
    assert "epoch_1: model.safetensors is damaged (its checksum differs" in _errors(caplog)[-1]
    assert (
        evaluate.main(["--checkpoint", str(tmp_path / "epoch_1"), "--val-data", "x.tar", "--device", "cpu"])
        == EXIT_CONFIG
    )
    assert "model.safetensors is damaged" in capsys.readouterr().err
