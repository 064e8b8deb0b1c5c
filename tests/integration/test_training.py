"""Whole runs through `training.main`: what is written, what resumes, what a mistake says."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import models
from tests.helpers.process import run_torchrun, run_training, start_training
from tests.helpers.shards import cut_tar, write_shards
from training.main import main

Shards = Callable[..., list[Path]]

TINY = [
    *("--model", "tiny-test", "--precision", "fp32", "--device", "cpu", "--batch-size", "8", "--workers", "0"),
    *("--epochs", "2", "--warmup", "2", "--lr", "1e-3", "--log-every-n-steps", "1", "--progress", "lines"),
]

KINDS = ("samples", "skips", "filtered")


@pytest.fixture(scope="session")
def clean_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three shards of 16 samples: 6 steps an epoch."""
    folder = tmp_path_factory.mktemp("clean")
    write_shards(folder, [16, 16, 16])
    return f"{folder}/shard-{{00000..00002}}.tar"


def run(logs: Path, data: str, *flags: str, name: str = "run") -> int:
    """One run in this process; the exit code."""
    return main([*TINY, "--train-data", data, "--logs", str(logs), "--name", name, *flags])


def records(logs: Path, name: str = "run") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (logs / name / "metrics.jsonl").read_text().splitlines()]


def losses(logs: Path, name: str = "run") -> dict[int, float]:
    """Training loss by step."""
    return {r["step"]: r["train/loss"] for r in records(logs, name) if "train/loss" in r}


def weights(logs: Path, checkpoint: str = "epoch_2", name: str = "run") -> dict[str, torch.Tensor]:
    """The weights of a checkpoint."""
    return load_file(logs / name / "checkpoints" / checkpoint / "model.safetensors")


def assert_same_end(a: Path, b: Path, checkpoint: str = "epoch_2") -> None:
    """Losses of every step and final weights are bitwise the same."""
    assert losses(a) == losses(b)
    first, second = weights(a, checkpoint), weights(b, checkpoint)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="session")
def uninterrupted(clean_shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The logs folder of a whole run, to compare others with."""
    logs = tmp_path_factory.mktemp("uninterrupted")
    assert run(logs, clean_shards) == 0
    return logs


def test_a_run_leaves_its_configuration_numbers_log_and_checkpoints(uninterrupted: Path) -> None:
    folder = uninterrupted / "run"
    assert {"config.yaml", "metrics.jsonl", "train.log", "checkpoints"} <= {p.name for p in folder.iterdir()}
    assert sorted(losses(uninterrupted)) == list(range(1, 13))
    last = records(uninterrupted)[-1]
    assert (last["step"], last["epoch"], last["samples_seen"]) == (12, 2, 96)
    expected = {"loss", "contrastive_loss", "lr", "logit_scale", "grad_norm", "skipped_samples", "data_time"}
    expected |= {"batch_time", "samples_per_second", "samples_per_second_per_gpu"}
    assert {f"train/{name}" for name in expected} <= last.keys()
    log = (folder / "train.log").read_text()
    for fact in ("world: 1 rank", "plan: 8 per rank", "model: tiny-test, 3.38 M", "start: ", f"folder: {folder}"):
        assert fact in log


def test_a_checkpoint_is_read_by_models_as_pretrained(uninterrupted: Path) -> None:
    folder = uninterrupted / "run" / "checkpoints" / "epoch_2"
    model = models.create_model("tiny-test", pretrained=str(folder))
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("stop", [2, 7])
def test_a_run_stopped_inside_an_epoch_and_resumed_equals_the_uninterrupted_one(
    uninterrupted: Path, clean_shards: str, tmp_path: Path, stop: int
) -> None:
    assert run(tmp_path, clean_shards, "--stop-after-steps", str(stop)) == 75
    assert (tmp_path / "run" / "checkpoints" / f"step_{stop:09d}").is_dir()
    assert run(tmp_path, clean_shards, "--resume", "latest") == 0
    assert_same_end(uninterrupted, tmp_path)
    assert records(tmp_path)[-1]["train/samples/shard"] == records(uninterrupted)[-1]["train/samples/shard"] == 96


def test_a_resume_at_another_global_batch_says_what_changes_and_its_checkpoints_count_as_the_newest(
    clean_shards: str, tmp_path: Path
) -> None:
    assert run(tmp_path, clean_shards, "--stop-after-steps", "4") == 75
    # Sixteen samples a step: the step after is the third, though a fourth is behind us.
    bigger = ("--resume", "latest", "--batch-size", "16")
    assert run(tmp_path, clean_shards, *bigger, "--stop-after-steps", "3") == 75
    log = (tmp_path / "run" / "train.log").read_text()
    assert (
        "changed since the checkpoint: global batch 8 -> 16, steps an epoch 6 -> 3, steps in all 12 -> 6, "
        "this step 4 -> 2, samples of warm-up 16 -> 32, learning rate here "
    ) in log
    assert "optimiser: AdamW, betas 0.9 and 0.999" in log
    assert "learning rate: to 0.001 in 2 steps (16 samples), then as a half cosine to 0 at step 12" in log
    assert run(tmp_path, clean_shards, *bigger) == 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("changed since the checkpoint") == 1 and "epoch_1 (step 3)" in log


def test_the_number_of_workers_changes_nothing(uninterrupted: Path, clean_shards: str, tmp_path: Path) -> None:
    assert run(tmp_path, clean_shards, "--workers", "2") == 0
    assert_same_end(uninterrupted, tmp_path)


@pytest.mark.slow
def test_a_killed_run_resumes_from_a_checkpoint_inside_the_epoch_bitwise(
    uninterrupted: Path, clean_shards: str, tmp_path: Path
) -> None:
    flags = [*TINY, "--train-data", clean_shards, "--logs", str(tmp_path), "--name", "run", "--workers", "1"]
    with start_training(*flags, "--save-every-n-steps", "2") as running:
        running.wait_for(r"saved .*step_000000004")
        running.kill()
    assert not (tmp_path / "run" / "checkpoints" / "epoch_2").exists()
    assert run(tmp_path, clean_shards, "--resume", "latest", "--save-every-n-steps", "2") == 0
    assert "resuming from" in (tmp_path / "run" / "train.log").read_text()
    assert_same_end(uninterrupted, tmp_path)


@pytest.mark.slow
def test_a_signal_saves_and_exits_with_75_and_the_resumed_run_equals_the_uninterrupted_one(
    uninterrupted: Path, clean_shards: str, tmp_path: Path
) -> None:
    flags = [*TINY, "--train-data", clean_shards, "--logs", str(tmp_path), "--name", "run", "--workers", "1"]
    with start_training(*flags) as running:
        running.wait_for(r"^step 2/")
        running.signal(signal.SIGUSR2, group=True)
        running.finish().expect(75)
    assert run(tmp_path, clean_shards, "--resume", "latest") == 0
    assert_same_end(uninterrupted, tmp_path)


@pytest.mark.slow
def test_two_ranks_by_torchrun_see_the_same_batches_and_resume_on_one(
    uninterrupted: Path, clean_shards: str, tmp_path: Path
) -> None:
    """Half the batch on each of two ranks; stopped there and finished on one rank with the whole batch."""
    flags = [*TINY, "--train-data", clean_shards, "--logs", str(tmp_path), "--name", "run"]
    run_torchrun(2, *flags, "--batch-size", "4", "--workers", "1", "--stop-after-steps", "4").expect(
        1
    )  # torchrun's own
    alone = losses(uninterrupted)
    assert losses(tmp_path) == {step: pytest.approx(alone[step], rel=2e-3) for step in range(1, 5)}
    assert run(tmp_path, clean_shards, "--resume", "latest") == 0
    assert sorted(losses(tmp_path)) == list(range(1, 13))
    # Adam's first updates divide by tiny second moments, so rounding differences between world sizes grow a little.
    assert losses(tmp_path) == {step: pytest.approx(alone[step], rel=2e-2) for step in range(1, 13)}


@pytest.mark.slow
def test_compiled_blocks_and_checkpointing_change_no_loss(
    uninterrupted: Path, clean_shards: str, tmp_path: Path
) -> None:
    """In a process of its own: the compiler's warnings are not ours to mend."""
    flags = [*TINY, "--train-data", clean_shards, "--logs", str(tmp_path), "--name", "run"]
    run_training(*flags, "--torchcompile", "--grad-checkpointing", "--stop-after-steps", "3", timeout_s=300).expect(75)
    alone = losses(uninterrupted)
    assert losses(tmp_path) == {step: pytest.approx(alone[step], rel=1e-3) for step in (1, 2, 3)}


def test_a_finished_run_says_so_instead_of_starting_over(
    uninterrupted: Path, clean_shards: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = records(uninterrupted)
    with caplog.at_level("INFO"):
        assert run(uninterrupted, clean_shards, "--resume", "latest") == 0
    assert "the run is complete" in caplog.text
    assert records(uninterrupted) == before


def test_a_checkpoint_is_saved_by_the_clock(clean_shards: str, tmp_path: Path) -> None:
    assert run(tmp_path, clean_shards, "--save-every-n-minutes", "0.0001", "--keep-last", "100") == 0
    names = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert {"epoch_1", "epoch_2"} < names
    assert any(name.startswith("step_") for name in names)


def test_every_tracker_gets_the_run(clean_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="W&B is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert run(tmp_path, clean_shards, "--report-to", "all", "--epochs", "1") == 0
    files = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()]
    assert any("tensorboard/events.out" in name for name in files)
    assert any(name.endswith(".wandb") for name in files)


def test_a_run_with_accumulation_and_augmentation_trains(clean_shards: str, tmp_path: Path) -> None:
    flags = ["--accum-freq", "2", "--batch-size", "4", "--precision", "amp_bfloat16", "--clip-grad-norm", "1"]
    augment = ["--aug-cfg", "use_timm=True", "scale=(0.5, 1.0)", "re_prob=0.4"]
    assert run(tmp_path, clean_shards, *flags, *augment, "--dataset-resampled") == 0
    assert all(value == value for value in losses(tmp_path).values())


# ---- weights of others


def test_an_openclip_checkpoint_at_another_image_size_is_resized_and_listed(clean_shards: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = models.create_model("tiny-test")
    state = {f"module.{key}": value for key, value in source.state_dict().items()}
    path = tmp_path / "epoch_7.pt"
    torch.save({"epoch": 7, "name": "x", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}, path)
    flags = ["--pretrained", str(path), "--force-image-size", "64", "--epochs", "1"]
    assert run(tmp_path, clean_shards, *flags) == 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert "visual.positional_embedding" in log
    assert weights(tmp_path, "epoch_1")["visual.positional_embedding"].shape[0] == 65


# ---- mistakes


def _mistakes(folder: Path, good: str) -> dict[str, tuple[list[str], str]]:
    other = folder / "other.pt"
    torch.save({"visual.conv1.weight": torch.zeros(4, 3, 2, 2)}, other)
    empty = folder / "empty"
    empty.mkdir()
    bad_yaml = folder / "bad.yaml"
    bad_yaml.write_text("learning_rate: 3\n")
    return {
        "unknown flag": (["--train-data", good, "--batchsize", "3"], "did you mean --batch-size"),
        "unknown key": (["--train-data", good, "--config", str(bad_yaml)], "unknown key 'learning_rate'"),
        "unknown model": (["--train-data", good, "--model", "ViT-B-33"], "ViT-B-32"),
        "missing shards": (["--train-data", str(folder / "no" / "{0..3}.tar")], "no/0.tar"),
        "empty folder": (["--train-data", str(empty)], "empty"),
        "pattern without match": (["--train-data", str(folder / "*.tar")], r"\*.tar"),
        "too few samples": (["--train-data", good, "--batch-size", "64"], "less than one global batch of 64"),
        "other architecture": (["--train-data", good, "--pretrained", str(other)], "visual.conv1.weight"),
        "absent weights": (["--train-data", good, "--pretrained", str(folder / "none.pt")], "none.pt"),
        "unknown tracker": (["--train-data", good, "--report-to", "wandbb"], "did you mean wandb"),
        "unknown augmentation": (["--train-data", good, "--aug-cfg", "skale=1"], "scale"),
        "not a literal": (["--train-data", good, "--aug-cfg", "scale=0.4 1.0"], "scale"),
        "resume of nothing": (["--train-data", good, "--resume", str(folder / "nothing")], "nothing"),
        "unknown count": (["--train-data", "pipe:cat x.tar", "--dataset-resampled"], "--train-num-samples is needed"),
    }


@pytest.mark.parametrize(
    "case",
    [
        *("unknown flag", "unknown key", "unknown model", "missing shards", "empty folder", "pattern without match"),
        *("too few samples", "other architecture", "absent weights", "unknown tracker", "unknown augmentation"),
        *("not a literal", "resume of nothing", "unknown count"),
    ],
)
def test_a_mistake_gets_one_clear_line_and_exit_code_2(
    case: str, clean_shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags, message = _mistakes(tmp_path, clean_shards)[case]
    code = main([*TINY, "--logs", str(tmp_path / "logs"), "--name", "x", *flags])
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert code == 2, errors
    assert any(message.replace("\\", "") in error for error in errors), errors
    assert not any(record.exc_info for record in caplog.records)


def test_an_existing_run_is_not_overwritten_without_resume(
    uninterrupted: Path, clean_shards: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(uninterrupted, clean_shards) == 2
    assert "--resume latest" in caplog.text


def test_a_model_that_differs_from_the_checkpoints_is_not_resumed(
    clean_shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(tmp_path, clean_shards, "--stop-after-steps", "1") == 75
    assert run(tmp_path, clean_shards, "--resume", "latest", "--force-image-size", "64") == 2
    assert "a resume never resizes" in caplog.text


# ---- bad data


def test_broken_samples_are_skipped_and_counted_by_reason(shards: Shards, tmp_path: Path) -> None:
    broken = {1: "truncated_image", 5: "no_caption", 9: "empty_caption", 20: "empty_image", 30: "no_image"}
    paths = shards([32, 32], broken=broken)
    assert run(tmp_path, str(paths[0].parent), "--max-skip-fraction", "0.5") == 0
    last = records(tmp_path)[-1]
    prefix = "train/skipped_samples/"
    reasons = {key.removeprefix(prefix): value for key, value in last.items() if key.startswith(prefix)}
    assert last["train/skipped_samples"] == sum(reasons.values()) >= 5
    assert set(reasons) == {"undecodable_image", "no_caption", "empty_caption", "empty_image", "no_image"}


def test_a_mixture_in_the_run_file_is_filtered_counted_by_source_and_resumed(tmp_path: Path) -> None:
    for name, count in {"small": 10, "large": 40}.items():
        write_shards(tmp_path / name, [count], broken={3: "no_caption"})
    sources = [
        {"name": "small", "shards": f"{tmp_path}/small", "proportion": 1},
        {"name": "large", "shards": f"{tmp_path}/large", "proportion": "3e0"},
    ]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"train_data": sources, "where": "index != 5"}))
    flags = [*TINY, "--config", f"{tmp_path}/run.yaml", "--max-skip-fraction", "0.5", "--logs", str(tmp_path)]
    assert main([*flags, "--name", "whole"]) == 0
    assert main([*flags, "--name", "cut", "--stop-after-steps", "5"]) == 75
    assert main([*flags, "--name", "cut", "--resume", "latest"]) == 0
    assert losses(tmp_path, "cut") == losses(tmp_path, "whole")
    last = records(tmp_path, "whole")[-1]
    used, lost, left = ([last[f"train/{kind}/{name}"] for name in ("small", "large")] for kind in KINDS)
    assert sum(used) == last["samples_seen"] == 96
    assert used[1] == pytest.approx(72, abs=3)
    assert [last["train/epochs/small"], last["train/epochs/large"]] == [
        pytest.approx(sum(counts) / size)
        for counts, size in zip(zip(used, lost, left, strict=True), (10, 40), strict=True)
    ]
    assert min(*lost, *left) > 0
    config = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    assert yaml.safe_load(config["train_data"])[0]["name"] == "small"


def test_a_tar_cut_short_gives_its_whole_samples_and_is_counted(shards: Shards, tmp_path: Path) -> None:
    paths = shards([32, 32, 32], sizes_json=True)
    cut_tar(paths[1])
    assert run(tmp_path, str(paths[0].parent), "--max-skip-fraction", "0.9", "--dataset-resampled") == 0
    assert records(tmp_path)[-1]["train/skipped_shards"] >= 1


def test_too_many_broken_samples_end_the_run_with_the_counts(
    shards: Shards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = shards([200], broken=dict.fromkeys(range(10, 200, 3), "truncated_image"))
    assert run(tmp_path, str(paths[0].parent), "--epochs", "20") == 1
    assert "undecodable_image" in caplog.text and "--max-skip-fraction" in caplog.text


def test_shards_that_vanish_end_the_run(shards: Shards, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = shards([16, 16], sizes_json=True)
    pipe = "pipe:cat " + str(paths[0].parent / "gone-{0..3}.tar")
    flags = ["--dataset-resampled", "--train-num-samples", "64", "--no-preflight"]
    assert run(tmp_path, pipe, *flags) == 1
    assert "gone-" in caplog.text


def test_the_preflight_stops_a_run_whose_shards_are_all_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = f"pipe:cat {tmp_path}/gone-{{0..3}}.tar"
    assert run(tmp_path, pipe, "--dataset-resampled", "--train-num-samples", "64") == 2
    assert "gone-" in caplog.text
