"""Whole runs that train a part of the model: what moves, what they say, and that they resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

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


def _weights(tmp_path: Path, name: str = "run") -> dict[str, torch.Tensor]:
    return load_file(tmp_path / "logs" / name / "checkpoints" / "epoch_1" / "model.safetensors")


def _start() -> dict[str, torch.Tensor]:
    """The weights that a run with seed 0 begins with."""
    torch.manual_seed(0)
    return models.build_model(models.load_model_config("tiny-test")).state_dict()


def _moved(tmp_path: Path, name: str = "run") -> set[str]:
    start = _start()
    return {key for key, value in _weights(tmp_path, name).items() if not torch.equal(value, start[key])}


@pytest.mark.parametrize(
    ("flags", "moves"),
    [
        (["--lock-image"], {"text"}),
        (["--lock-image", "--lock-image-unlocked-groups", "1"], {"text", "visual.proj"}),
        (["--lock-text", "--lock-text-freeze-layer-norm"], {"visual"}),
        (["--lock-text", "--no-lock-text-freeze-layer-norm", "--accum-freq", "2"], {"visual", "ln_final.weight"}),
        (["--lock-image", "--lock-text", "--lock-text-unlocked-layers", "2"], {"text_projection", "ln_final.weight"}),
    ],
)
def test_a_run_moves_what_its_locks_leave(tmp_path: Path, flags: list[str], moves: set[str]) -> None:
    assert _run(tmp_path, *flags) == 0
    found = _moved(tmp_path)
    assert "logit_scale" in found
    assert any(key.startswith("visual.transformer") for key in found) == ("visual" in moves)
    assert ("token_embedding.weight" in found) == ("text" in moves)
    assert moves - {"text", "visual"} <= found


def test_a_locked_run_resumes_where_it_was_and_with_the_same_locks_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock = ["--lock-image", "--lock-image-unlocked-groups", "2", "--image-layer-decay", "0.5"]
    assert _run(tmp_path, *lock) == 0
    assert _run(tmp_path, *lock, "--stop-after-steps", "2", name="again") == 75
    assert _run(tmp_path, "--resume", "latest", name="again") == 2
    assert "a run resumes with the parts locked that were" in caplog.text
    assert _run(tmp_path, *lock, "--resume", "latest", name="again") == 0
    first, second = _weights(tmp_path), _weights(tmp_path, "again")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_layers_far_from_the_output_learn_more_slowly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert _run(tmp_path) == 0
    assert _run(tmp_path, "--image-layer-decay", "0.1", "--text-layer-decay", "0.1", name="slow") == 0
    assert "learning rates down to 0.001 of --lr" in caplog.text
    start = _start()
    ways = {
        key: [float((weights[key] - start[key]).norm()) for weights in (_weights(tmp_path), _weights(tmp_path, "slow"))]
        for key in ("visual.conv1.weight", "visual.proj", "token_embedding.weight", "text_projection")
    }
    ratios = {key: slow / full for key, (full, slow) in ways.items()}
    assert ratios["visual.proj"] == pytest.approx(1, abs=0.1)
    assert ratios["text_projection"] == pytest.approx(1, abs=0.1)
    assert ratios["visual.conv1.weight"] == pytest.approx(1e-3, rel=0.2)
    assert ratios["token_embedding.weight"] == pytest.approx(1e-3, rel=0.2)


def test_the_rate_in_the_metrics_is_that_of_the_output(tmp_path: Path) -> None:
    assert _run(tmp_path, "--image-layer-decay", "0.5", "--skip-scheduler") == 0
    lines = (tmp_path / "logs" / "run" / "metrics.jsonl").read_text().splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    assert {record["train/lr"] for record in records if "train/lr" in record} == {1e-3}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lock-image-unlocked-groups", "1"], "--lock-image-unlocked-groups needs --lock-image"),
        (["--lock-image-freeze-bn-stats"], "--lock-image-freeze-bn-stats needs --lock-image"),
        (["--no-lock-text-freeze-layer-norm"], "--no-lock-text-freeze-layer-norm needs --lock-text"),
        (["--lock-text", "--lock-text-unlocked-layers", "-1"], "--lock-text-unlocked-layers must not be negative"),
        (["--lock-text", "--lock-text-unlocked-layers", "99"], "this tower has 4 groups of layers"),
        (["--text-layer-decay", "1.5"], "--text-layer-decay is a factor above 0 and at most 1"),
    ],
)
def test_wrong_companions_are_named(
    tmp_path: Path, flags: list[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert _run(tmp_path, *flags) == 2
    assert message in caplog.text
