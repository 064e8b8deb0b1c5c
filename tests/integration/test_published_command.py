"""The published ConvNeXt-Large-D fine-tune command, flag for flag, with a small model, on two ranks, from S3."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import models
from tests.helpers.process import run_torchrun
from tests.helpers.s3 import S3Server
from tests.helpers.shards import write_shards
from tests.training.test_cli import PUBLISHED

# What a small machine changes: the model, the batch, the samples, the places. Later flags win over earlier ones.
SMALL = ["--model", "tiny-test-timm", "--batch-size=4", "--epochs=2", "--train-num-samples", "16", "--workers=1"]


@pytest.mark.slow
def test_the_published_command_trains_on_two_ranks_and_says_that_it_is_complete_when_repeated(
    s3_server: S3Server, tmp_path: Path
) -> None:
    if shutil.which("aws") is None:
        pytest.skip("the aws command is not installed")
    for path in write_shards(tmp_path / "shards", [64] * 4, image_size=80, name="laion{:05d}.tar"):
        s3_server.upload(path, f"path/{path.name}")
    state = {f"module.{k}": v for k, v in models.create_model("tiny-test-timm").state_dict().items()}
    torch.save({"epoch": 128, "name": "x", "state_dict": state}, tmp_path / "epoch_128.pt")
    data = f"--train-data=pipe:aws s3 cp {s3_server.url('path/laion{00000..00003}.tar')} -"
    places = ["--pretrained", tmp_path / "epoch_128.pt", "--logs-dir", tmp_path / "logs", "--device", "cpu"]
    command = [*PUBLISHED, *SMALL, data, *map(str, places)]

    first = run_torchrun(2, *command).expect(0)
    assert "converted: stripped module." in first.output
    run = tmp_path / "logs" / "convnext_large_320"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 4]
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"epoch_1", "epoch_2"}

    second = run_torchrun(2, *command).expect(0)
    assert "the run is complete" in second.output
