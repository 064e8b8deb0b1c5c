"""Runs with averaged weights: what is saved and evaluated, resumes, rollbacks, and any number of ranks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import models
from scripts.evaluate import main as evaluate
from tests.helpers.gloo import run_ranks
from tests.helpers.shards import write_shards
from training.checkpoint_content import load_checkpoint
from training.cli import parse_args
from training.distributed import World
from training.learner import build_learner, restore
from training.main import main
from training.setup import resolve_model
from training.start import Fresh

HALF_LIFE, BATCH = 24, 8
CHECKPOINTS = [f"epoch_{step // 4}" if step % 4 == 0 else f"step_{step:09d}" for step in range(1, 9)]
EMA = ("--model-ema-samples", str(HALF_LIFE))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("ema-shards")
    write_shards(folder, [16, 16])
    return f"{folder}/shard-{{00000..00001}}.tar"


def flags(logs: Path, data: str, *more: str) -> list[str]:
    """Two epochs of four steps, whose ends are evaluated; a checkpoint after each step."""
    return [
        *("--model", "tiny-test", "--precision", "fp32", "--device", "cpu", "--batch-size", str(BATCH)),
        *("--workers", "0", "--epochs", "2", "--warmup", "0", "--lr", "1e-3", "--log-every-n-steps", "1"),
        *("--progress", "lines", "--save-every-n-steps", "1", "--keep-last", "9", "--eps", "1e-3"),
        *("--train-data", data, "--val-data", data, "--logs", str(logs), "--name", "run", *more),
    ]


def tensors(logs: Path, checkpoint: str = "epoch_2", file: str = "ema.safetensors") -> dict[str, Tensor]:
    return load_file(logs / "run" / "checkpoints" / checkpoint / file)


def figures(logs: Path) -> dict[str, float]:
    records = [json.loads(line) for line in (logs / "run" / "metrics.jsonl").read_text().splitlines()]
    return {name: value for record in records for name, value in record.items() if name.startswith("val/")}


@pytest.fixture(scope="module")
def whole(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The logs folder of an uninterrupted run."""
    logs = tmp_path_factory.mktemp("ema-whole")
    assert main(flags(logs, shards, *EMA)) == 0
    return logs


def test_the_saved_average_is_that_of_the_saved_weights(whole: Path) -> None:
    decay = 0.5 ** (BATCH / HALF_LIFE)
    average = {name: value.double() for name, value in tensors(whole, CHECKPOINTS[0]).items()}
    for checkpoint in CHECKPOINTS[1:]:
        for name, weight in tensors(whole, checkpoint, "model.safetensors").items():
            average[name] = decay * average[name] + (1 - decay) * weight.double()
    for name, value in tensors(whole).items():
        torch.testing.assert_close(value.double(), average[name], rtol=1e-6, atol=1e-6)


def test_the_average_is_evaluated_beside_the_weights(whole: Path, tmp_path: Path, shards: str) -> None:
    trained = figures(whole)
    averaged = {f"val/{name.removeprefix('val/ema/')}" for name in trained if name.startswith("val/ema/")}
    assert averaged == {name for name in trained if not name.startswith("val/ema/")}
    assert trained["val/ema/clip_val_loss"] != trained["val/clip_val_loss"]
    checkpoint = whole / "run" / "checkpoints" / "epoch_2"
    for arguments in (
        ["--checkpoint", str(checkpoint), "--ema"],
        ["--checkpoint", str(checkpoint / "ema.safetensors")],
    ):
        output = tmp_path / "figures.json"
        assert evaluate([*arguments, "--val-data", shards, "--device", "cpu", "--json", str(output)]) == 0
        loss = json.loads(output.read_text())["val/clip_val_loss"]
        assert loss == pytest.approx(trained["val/ema/clip_val_loss"], rel=1e-5)


def test_a_checkpoint_without_an_average_is_refused_by_name(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(tmp_path, shards, "--stop-after-steps", "1")) == 75
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000000001"
    assert evaluate(["--checkpoint", str(checkpoint), "--ema", "--val-data", shards, "--device", "cpu"]) == 2
    assert "has no ema.safetensors; a run with --model-ema-samples" in capsys.readouterr().err


def test_the_average_is_loaded_as_weights(whole: Path) -> None:
    path = whole / "run" / "checkpoints" / "epoch_2" / "ema.safetensors"
    model = models.create_model("tiny-test", pretrained=str(path))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in tensors(whole).items())


def test_training_is_the_same_with_and_without_an_average(whole: Path, shards: str, tmp_path: Path) -> None:
    assert main(flags(tmp_path, shards)) == 0
    ours, plain = (tensors(logs, file="model.safetensors") for logs in (whole, tmp_path))
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize("resumed", [EMA, ()])
def test_a_resumed_run_has_the_average_of_the_uninterrupted_one_bitwise(
    whole: Path, shards: str, tmp_path: Path, resumed: tuple[str, ...]
) -> None:
    assert main(flags(tmp_path, shards, *EMA, "--stop-after-steps", "2")) == 75
    assert main(flags(tmp_path, shards, *resumed, "--resume", "latest")) == 0
    log = (tmp_path / "run" / "train.log").read_text()
    if not resumed:
        assert "the checkpoint's averaged weights are left behind: there is no --model-ema-samples" in log
        assert not (tmp_path / "run" / "checkpoints" / "epoch_2" / "ema.safetensors").exists()
        return
    ours, theirs = tensors(tmp_path), tensors(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert figures(tmp_path) == figures(whole)


def test_a_resume_of_a_checkpoint_without_an_average_begins_one_with_its_weights(shards: str, tmp_path: Path) -> None:
    assert main(flags(tmp_path, shards, "--stop-after-steps", "2")) == 75
    assert main(flags(tmp_path, shards, *EMA, "--resume", "latest", "--stop-after-steps", "3")) == 75
    assert "the checkpoint has no averaged weights: the average begins" in (tmp_path / "run" / "train.log").read_text()
    decay = 0.5 ** (BATCH / HALF_LIFE)
    old, new = (tensors(tmp_path, f"step_00000000{step}", "model.safetensors") for step in (2, 3))
    for name, value in tensors(tmp_path, "step_000000003").items():
        expected = decay * old[name].double() + (1 - decay) * new[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("averaged", [True, False])
def test_a_learner_in_use_goes_back_to_a_checkpoint_with_its_average(
    whole: Path, shards: str, tmp_path: Path, averaged: bool
) -> None:
    config = parse_args(flags(whole, shards, *EMA))
    learner = build_learner(config, resolve_model(config), Fresh("test"), None, World())
    loaded = load_checkpoint(whole / "run" / "checkpoints" / "epoch_2")
    restore(learner, loaded if averaged else dataclasses.replace(loaded, ema=None))
    expected = tensors(whole, file="ema.safetensors" if averaged else "model.safetensors")
    assert learner.ema is not None
    assert all(torch.equal(value, expected[name]) for name, value in learner.ema.state().items())


def test_a_dry_run_counts_the_average(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = sum(parameter.nbytes for parameter in models.create_model("tiny-test").parameters())
    assert main(flags(tmp_path, shards, *EMA, "--dry-run")) == 0
    assert f"averaged weights {size / 2**20:,.1f} MiB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--model-ema-samples", "0"), "--model-ema-samples must be positive, got 0"),
        (("--model-ema-rampup", "0.05"), "--model-ema-rampup needs --model-ema-samples"),
        ((*EMA, "--model-ema-rampup", "0"), "--model-ema-rampup must be positive, got 0"),
    ],
)
def test_a_half_life_that_means_nothing_is_refused(more: tuple[str, ...], reason: str) -> None:
    with pytest.raises(models.ConfigError, match=reason):
        parse_args(["--train-data", "a.tar", *more])


def on_rank(arguments: list[str]) -> int:
    torch.set_num_threads(1)
    return main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("how", [("--fsdp",), ("--accum-freq", "2")])
def test_two_ranks_that_stop_and_go_on_keep_the_average_of_one_process(
    whole: Path, shards: str, tmp_path: Path, how: tuple[str, ...]
) -> None:
    rows = BATCH // 2 // (2 if "--accum-freq" in how else 1)
    command = flags(tmp_path, shards, *EMA, *how, "--batch-size", str(rows))
    assert run_ranks(on_rank, 2, [*command, "--stop-after-steps", "5"], timeout_s=200) == [75] * 2
    assert run_ranks(on_rank, 2, [*command, "--resume", "latest"], timeout_s=200) == [0] * 2
    for name, value in tensors(whole).items():
        torch.testing.assert_close(tensors(tmp_path)[name], value, rtol=1e-3, atol=1e-5)
    assert figures(tmp_path) == pytest.approx(figures(whole), rel=1e-4)
