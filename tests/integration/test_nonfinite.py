"""Whole runs in which one rank meets a value that is not finite: skipped, rolled back or ended, on all ranks alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.gloo import run_ranks
from tests.helpers.poison import Report, poisoned_run
from tests.helpers.shards import write_shards
from training.checkpoint_files import write_checkpoint

TINY = [
    *("--model", "tiny-test", "--precision", "fp32", "--device", "cpu", "--batch-size", "4", "--workers", "0"),
    *("--epochs", "2", "--warmup", "2", "--lr", "1e-3", "--log-every-n-steps", "1", "--progress", "lines"),
    *("--save-every-n-steps", "2", "--keep-last", "100"),
]
GLOBAL_BATCH = 8  # of two ranks


@pytest.fixture(scope="session")
def two_rank_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three shards of 16 samples: 6 steps an epoch on two ranks, 12 in all."""
    folder = tmp_path_factory.mktemp("two-rank")
    write_shards(folder, [16, 16, 16])
    return f"{folder}/shard-{{00000..00002}}.tar"


def run(
    logs: Path, shards: str, *flags: str, batches: set[int], kind: str = "features", ranks: int = 2
) -> list[Report]:
    """A run of which rank 1, or the only one, meets poisoned `batches` (numbered from 1)."""
    command = [*TINY, "--train-data", shards, "--logs", str(logs), "--name", "run", *flags]
    if ranks == 1:
        return [poisoned_run(command, 0, batches, kind)]
    return run_ranks(poisoned_run, ranks, command, 1, batches, kind)


def records(logs: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (logs / "run" / "metrics.jsonl").read_text().splitlines()]


def losses(logs: Path) -> list[tuple[int, float]]:
    """Step and loss of every training record, in the order of the file."""
    return [(r["step"], r["train/loss"]) for r in records(logs) if "train/loss" in r]


def events(logs: Path, name: str) -> list[dict[str, Any]]:
    return [r[f"event/{name}"] for r in records(logs) if f"event/{name}" in r]


def checkpoint(logs: Path, name: str) -> Path:
    return logs / "run" / "checkpoints" / name


def assert_equal_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def with_position_of(folder: Path, other: Path, target: Path) -> Path:
    """A whole checkpoint at `target`: that of `folder`, with the data position of `other`."""
    tensors = {name: load_file(folder / name) for name in ("model.safetensors", "optimizer.safetensors")}
    documents = {p.name: p.read_text() for p in folder.iterdir() if p.suffix in (".json", ".yaml")}
    manifest = json.loads(documents.pop("manifest.json"))
    documents["data.json"] = (other / "data.json").read_text()
    write_checkpoint(target, tensors, documents, step=manifest["step"], epoch=manifest["epoch"])
    return target


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["features", "gradient"])
def test_a_nan_on_one_rank_is_skipped_by_all_and_traced_to_its_samples(
    two_rank_shards: str, tmp_path: Path, kind: str
) -> None:
    first, second = run(tmp_path, two_rank_shards, batches={3}, kind=kind)
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert first.skipped == second.skipped == [number == 3 for number in range(1, 13)]
    assert_equal_weights(first.weights, second.weights)
    (event,) = events(tmp_path, "nonfinite")
    assert (event["step"], event["cause"], event["ranks"]) == (3, kind, [1])
    named = [key for keys in event["samples"].values() for key in keys]
    assert sorted(named) == sorted(second.poisoned) and event["num_samples"] == len(named)
    assert all(".tar" in shard for shard in event["samples"])
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("step 3: loss") == 1 and second.poisoned[0] in log and "rank 1" in log


@pytest.mark.slow
def test_after_a_rollback_the_run_equals_a_resume_from_that_checkpoint_with_the_later_data_position(
    two_rank_shards: str, tmp_path: Path
) -> None:
    clean, rolled, resumed = (tmp_path / name for name in ("clean", "rolled", "resumed"))
    run(clean, two_rank_shards, batches=set())
    flags = ("--on-nonfinite", "rollback", "--max-nonfinite", "1")
    first, second = run(rolled, two_rank_shards, *flags, batches={6, 7})
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert_equal_weights(first.weights, second.weights)
    # Known while step 8 runs: from there to the checkpoint at step 4, and on with the ninth batch.
    (event,) = events(rolled, "rollback")
    assert (event["from_step"], event["to_step"], event["samples_passed_over"]) == (8, 4, 4 * GLOBAL_BATCH)
    assert [offence["step"] for offence in event["offences"]] == [6, 7]
    assert len(first.keys) == 8 + 8
    assert [step for step, _ in losses(rolled)] == list(range(1, 13))
    target = resumed / "run" / "checkpoints" / "step_000000004"
    target.parent.mkdir(parents=True)
    with_position_of(checkpoint(clean, "step_000000004"), checkpoint(clean, "step_000000008"), target)
    again, _ = run(resumed, two_rank_shards, "--resume", "latest", batches=set())
    assert again.keys == first.keys[8:]
    assert losses(resumed) == losses(rolled)[4:]
    assert_equal_weights(again.weights, first.weights)


@pytest.mark.slow
def test_a_run_that_stops_after_a_rollback_goes_on_where_it_was(two_rank_shards: str, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ("--batch-size", "8", "--on-nonfinite", "rollback", "--max-nonfinite", "1")
    (uninterrupted,) = run(whole, two_rank_shards, *flags, batches={6, 7}, ranks=1)
    (before,) = run(parts, two_rank_shards, *flags, "--stop-after-steps", "9", batches={6, 7}, ranks=1)
    (after,) = run(parts, two_rank_shards, *flags, "--resume", "latest", batches=set(), ranks=1)
    assert (before.exit_code, after.exit_code) == (75, 0)
    assert before.keys + after.keys == uninterrupted.keys
    assert losses(parts) == losses(whole)
    assert_equal_weights(after.weights, uninterrupted.weights)
    assert len(events(parts, "rollback")) == 1
    state = json.loads((checkpoint(parts, "epoch_2") / "state.json").read_text())
    assert state["rollbacks"] == 1


@pytest.mark.slow
def test_a_run_that_ends_right_after_a_rollback_does_not_read_the_bad_samples_again(
    two_rank_shards: str, tmp_path: Path
) -> None:
    flags = ("--batch-size", "8", "--on-nonfinite", "rollback", "--max-nonfinite", "1", "--save-every-n-steps", "4")
    (first,) = run(tmp_path, two_rank_shards, *flags, "--max-rollbacks", "1", batches={5, 6, 7, 8}, ranks=1)
    assert first.exit_code == 1 and len(first.keys) == 8
    assert [path.name for path in checkpoint(tmp_path, "").iterdir()] == ["step_000000004"]
    (second,) = run(tmp_path, two_rank_shards, *flags, "--resume", "latest", batches=set(), ranks=1)
    assert second.exit_code == 0 and len(second.keys) == 8
    assert second.keys[:2] == first.keys[6:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "batches", "steps", "message"),
    [
        (("--on-nonfinite", "stop"), {3}, 4, "1 in a row"),
        (("--on-nonfinite", "skip", "--max-nonfinite", "2"), {3, 4, 6, 7, 8}, 8, "3 in a row"),
        (("--on-nonfinite", "rollback", "--max-nonfinite", "0"), {1}, 2, "no checkpoint is from before them"),
        (
            ("--on-nonfinite", "rollback", "--max-nonfinite", "0", "--max-rollbacks", "2"),
            {3, 5, 7},
            8,
            "--max-rollbacks 2 is reached",
        ),
    ],
)
def test_the_limits_end_the_run_on_all_ranks_with_exit_code_1(
    two_rank_shards: str, tmp_path: Path, flags: tuple[str, ...], batches: set[int], steps: int, message: str
) -> None:
    first, second = run(tmp_path, two_rank_shards, *flags, batches=batches)
    assert (first.exit_code, second.exit_code) == (1, 1)
    assert len(first.keys) == len(second.keys) == steps
    assert_equal_weights(first.weights, second.weights)
    assert message in (tmp_path / "run" / "train.log").read_text()
