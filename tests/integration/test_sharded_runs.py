"""Runs under FSDP and DDP continue each other, at another number of ranks too, and evaluate alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.gloo import run_ranks
from tests.helpers.shards import write_shards
from training.main import main

STOPS_AT, STEPS = 4, 6  # an epoch has three


def on_rank(flags: list[str]) -> int:
    torch.set_num_threads(1)
    return main(flags)


class Runs:
    """Runs of one small set, by name."""

    def __init__(self, folder: Path):
        self.logs = folder / "logs"
        write_shards(folder / "shards", [16, 16, 16])
        shards = f"{folder}/shards/shard-{{00000..00002}}.tar"
        self._flags = [
            *(
                "--model",
                "tiny-test",
                "--precision",
                "fp32",
                "--device",
                "cpu",
                "--workers",
                "0",
                "--logs",
                str(self.logs),
            ),
            *("--epochs", "2", "--warmup", "2", "--lr", "1e-3", "--log-every-n-steps", "1", "--progress", "lines"),
            *("--train-data", shards, "--val-data", shards, "--clip-grad-norm", "1"),
            # Where a gradient is rounding alone (a key's bias), AdamW must not make a direction of it.
            *("--eps", "1e-3"),
        ]

    def run(self, name: str, ranks: int, *flags: str) -> None:
        batch = ["--batch-size", str(16 // ranks), "--name", name]
        stopped = "--stop-after-steps" in flags
        arguments = [*self._flags, *batch, *flags]
        assert run_ranks(on_rank, ranks, arguments, timeout_s=200) == [75 if stopped else 0] * ranks

    def resume(self, start: str, name: str, ranks: int, *flags: str) -> list[float]:
        shutil.copytree(self.logs / start, self.logs / name)
        self.run(name, ranks, "--resume", "latest", *flags)
        return self.losses(name)[STOPS_AT:]

    def records(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.logs / name / "metrics.jsonl").read_text().splitlines()]

    def losses(self, name: str) -> list[float]:
        return [record["train/loss"] for record in self.records(name) if "train/loss" in record]

    def state(self, name: str, file: str) -> dict[str, torch.Tensor]:
        return load_file(self.logs / name / "checkpoints" / f"step_{STOPS_AT:09d}" / file)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A whole run under DDP, and one under each wrapper that stops in its second epoch."""
    runs = Runs(tmp_path_factory.mktemp("sharded"))
    runs.run("whole", 2)
    runs.run("ddp", 2, "--stop-after-steps", str(STOPS_AT))
    runs.run("fsdp", 2, "--fsdp", "--stop-after-steps", str(STOPS_AT))
    return runs


@pytest.mark.slow
def test_a_checkpoint_has_the_same_form_whatever_wrote_it(runs: Runs) -> None:
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = runs.state("fsdp", file), runs.state("ddp", file)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("start", "then"), [("fsdp", ()), ("ddp", ("--fsdp",)), ("fsdp", ("--fsdp",))])
def test_a_run_goes_on_under_the_other_wrapper_with_the_same_losses(
    runs: Runs, start: str, then: tuple[str, ...]
) -> None:
    continued = runs.resume(start, f"{start}-2{''.join(then)}", 2, *then)
    assert continued == pytest.approx(runs.losses("whole")[STOPS_AT:], rel=1e-5)
    assert len(continued) == STEPS - STOPS_AT


@pytest.mark.slow
def test_a_run_of_two_shards_goes_on_in_one_process(runs: Runs) -> None:
    assert runs.resume("fsdp", "fsdp-1", 1) == pytest.approx(runs.resume("ddp", "ddp-1", 1), rel=1e-5)


@pytest.mark.slow
def test_evaluation_gives_the_figures_of_an_unsharded_model(runs: Runs) -> None:
    figures = [
        {key: value for record in runs.records(name) for key, value in record.items() if key.startswith("val/")}
        for name in ("ddp", "fsdp")
    ]
    assert "val/clip_val_loss" in figures[0]
    assert figures[1] == pytest.approx(figures[0], rel=1e-4)
