"""Runs that train adapters: what changes, what is saved, resumes, and any number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import models
from models.lora import plain_name
from scripts.evaluate import main as evaluate
from tests.helpers.gloo import run_ranks
from tests.helpers.shards import write_shards
from training.checkpoint_content import load_checkpoint
from training.cli import parse_args
from training.distributed import World
from training.learner import build_learner, restore
from training.main import main
from training.optimizer import parameter_names
from training.setup import resolve_model
from training.start import Fresh

pytest.importorskip("peft", reason="the adapters are peft's")

RANK = ("--lora-rank", "2")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("lora-shards")
    write_shards(folder, [16, 16])
    return f"{folder}/shard-{{00000..00001}}.tar"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights to start from."""
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("lora-weights") / "weights.safetensors"
    save_file(models.create_model("tiny-test").state_dict(), path)
    return path


def flags(logs: Path, data: str, pretrained: Path, *more: str) -> list[str]:
    """An epoch of four steps; a checkpoint after each."""
    return [
        *("--model", "tiny-test", "--precision", "fp32", "--device", "cpu", "--batch-size", "8", "--workers", "0"),
        *("--epochs", "1", "--warmup", "0", "--lr", "1e-2", "--log-every-n-steps", "1", "--progress", "lines"),
        *("--save-every-n-steps", "1", "--keep-last", "9", "--eps", "1e-3", "--pretrained", str(pretrained)),
        *("--train-data", data, "--val-data", data, "--logs", str(logs), "--name", "run", *RANK, *more),
    ]


def checkpoint(logs: Path, name: str = "epoch_1") -> Path:
    return logs / "run" / "checkpoints" / name


def tensors(logs: Path, name: str = "epoch_1", file: str = "lora.safetensors") -> dict[str, Tensor]:
    return load_file(checkpoint(logs, name) / file)


@pytest.fixture(scope="module")
def whole(shards: str, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The logs folder of an uninterrupted run."""
    logs = tmp_path_factory.mktemp("lora-whole")
    assert main(flags(logs, shards, pretrained)) == 0
    return logs


def test_only_adapters_and_the_temperature_change(whole: Path, pretrained: Path) -> None:
    before, merged = load_file(pretrained), tensors(whole, file="model.safetensors")
    changed = {name for name, value in before.items() if not torch.equal(value, merged[name])}
    apart = tensors(whole)
    adapted = {name for name in apart if name.endswith(".base_layer.weight")}
    assert len(adapted) == 16 and merged.keys() == before.keys()
    assert changed == {"logit_scale"} | {plain_name(name) for name in adapted}
    assert all(torch.equal(apart[name], before[plain_name(name)]) for name in adapted)
    assert "LoRA: image tower: rank 2 on 8 matrices" in (whole / "run" / "train.log").read_text()


def test_the_merged_checkpoint_scores_what_the_adapted_model_scored(whole: Path, shards: str, tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    command = ["--checkpoint", str(checkpoint(whole)), "--val-data", shards, "--device", "cpu", "--json", str(output)]
    assert evaluate(command) == 0
    records = [json.loads(line) for line in (whole / "run" / "metrics.jsonl").read_text().splitlines()]
    (trained,) = [record["val/clip_val_loss"] for record in records if "val/clip_val_loss" in record]
    assert json.loads(output.read_text())["val/clip_val_loss"] == pytest.approx(trained, rel=1e-5)


def assert_same(a: Path, b: Path) -> None:
    for file in ("lora.safetensors", "model.safetensors", "optimizer.safetensors"):
        ours, theirs = tensors(a, file=file), tensors(b, file=file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_resumed_run_ends_bitwise_as_the_uninterrupted_one(
    whole: Path, shards: str, pretrained: Path, tmp_path: Path
) -> None:
    assert main(flags(tmp_path, shards, pretrained, "--stop-after-steps", "2")) == 75
    assert main(flags(tmp_path, shards, pretrained, "--resume", "latest")) == 0
    assert_same(whole, tmp_path)


def test_a_resume_with_other_adapters_is_refused(
    whole: Path, shards: str, pretrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(whole / "run", tmp_path / "run")
    shutil.rmtree(checkpoint(tmp_path))
    command = flags(tmp_path, shards, pretrained, "--resume", "latest")
    assert main([*command, "--lora-rank", "4"]) == 2
    assert "2x64 in the checkpoint, 4x64 by --lora-rank" in caplog.text
    at = command.index("--lora-rank")
    assert main([*command[:at], *command[at + 2 :]]) == 2
    assert "the checkpoint has adapters, so it needs --lora-rank" in caplog.text


def test_a_learner_in_use_goes_back_to_a_checkpoint_whole(whole: Path, shards: str, pretrained: Path) -> None:
    config = parse_args(flags(whole, shards, pretrained))
    learner = build_learner(config, resolve_model(config), Fresh("test"), None, World())
    restore(learner, load_checkpoint(checkpoint(whole)))
    state, apart = learner.model.state_dict(), tensors(whole)
    merged = tensors(whole, file="model.safetensors")
    for name, value in state.items():
        assert torch.equal(value, apart[name] if name in apart else merged[plain_name(name)]), name
    names = parameter_names(learner.model)
    moments = {names[p]: state["exp_avg"] for p, state in learner.optimizer.state.items()}
    saved = tensors(whole, file="optimizer.safetensors")
    assert all(torch.equal(value, saved[f"exp_avg/{name}"]) for name, value in moments.items())


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--fsdp",), "--lora-rank with --fsdp is refused: a checkpoint holds adapters and weights as one"),
        (("--model-ema-samples", "100"), "--lora-rank with --model-ema-samples is refused: the average of an adapter"),
        (("--lock-image",), "--lora-rank with --lock-image or --lock-text is refused: LoRA freezes both"),
        (("--lora-rank", "0"), "--lora-rank must be positive, got 0"),
        (("--lora-text-rank", "-1"), "--lora-text-rank must not be negative, got -1"),
        (("--lora-alpha", "0"), "--lora-alpha must be positive, got 0"),
    ],
)
def test_what_adapters_do_not_go_with_is_refused(more: tuple[str, ...], reason: str) -> None:
    with pytest.raises(models.ConfigError, match=reason):
        parse_args(flags(Path("logs"), "a.tar", Path("weights.safetensors"), *more))


@pytest.mark.parametrize("flag", [("--lora-alpha", "8"), ("--lora-target", "qkv"), ("--lora-train-projections",)])
def test_what_belongs_to_adapters_needs_a_rank(flag: tuple[str, ...]) -> None:
    with pytest.raises(models.ConfigError, match=f"{flag[0]} needs --lora-rank"):
        parse_args(["--train-data", "a.tar", *flag])


def on_rank(arguments: list[str]) -> int:
    torch.set_num_threads(1)
    return main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "how"), [("both", ("--grad-checkpointing",)), ("image", ("--lora-text-rank", "0", "--ddp-static-graph"))]
)
def test_two_ranks_train_the_adapters_of_one_process(
    shards: str, pretrained: Path, tmp_path: Path, ranks: str, how: tuple[str, ...]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    accumulating = ("--batch-size", "2", "--accum-freq", "2") if ranks == "both" else ("--batch-size", "4")
    assert main(flags(one, shards, pretrained, *(how[:2] if ranks == "image" else ()))) == 0
    assert run_ranks(on_rank, 2, flags(two, shards, pretrained, *how, *accumulating), timeout_s=200) == [0] * 2
    theirs = tensors(two, file="model.safetensors")
    for name, value in tensors(one, file="model.safetensors").items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-5)


def test_accumulating_over_a_frozen_text_tower_changes_nothing(shards: str, pretrained: Path, tmp_path: Path) -> None:
    for name, how in (("one", ()), ("two", ("--batch-size", "4", "--accum-freq", "2"))):
        assert main(flags(tmp_path / name, shards, pretrained, "--lora-text-rank", "0", *how)) == 0
    found = [tensors(tmp_path / name, file="model.safetensors") for name in ("one", "two")]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-5)
