"""Saving on all ranks: waiting for a disk that stands still, and the names that epochs get."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.gloo import run_ranks
from training import checkpoint
from training.checkpoint import Checkpointer
from training.checkpoint_content import Progress
from training.config import ClusterConfig, RunConfig, TrainConfig
from training.distributed import session
from training.plan import Plan
from training.saving import Saver


def _save_to_a_slow_disk(folder: Path, seconds: float) -> list[str]:
    """Save, and wait for a write that hangs for `seconds`."""
    write = checkpoint.write_checkpoint

    def hanging(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return write(*arguments, **options)

    checkpoint.write_checkpoint = hanging  # type: ignore[assignment]
    with session(ClusterConfig(device="cpu", dist_timeout_s=5.0)) as world, Checkpointer(folder, world) as checkpointer:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        saver = Saver(checkpointer, model, optimizer, TrainConfig(), None, world, {})  # type: ignore[arg-type]
        checkpointer.save(
            "epoch_1",
            progress=Progress(1, 1, 8),
            model_state=model.state_dict(),
            optimizer_state={},
            data_position={},
            config={},
            model_config={},
        )
        saver.finish()
        return os.listdir(folder)


@pytest.mark.slow
def test_a_write_that_hangs_for_longer_than_a_collective_may_take_is_waited_for(tmp_path: Path) -> None:
    assert run_ranks(_save_to_a_slow_disk, 2, tmp_path, 12.0) == [["epoch_1"]] * 2


@pytest.mark.parametrize(
    ("save_most_recent", "expected"),
    [(False, {6: "epoch_1", 12: "epoch_2", 7: "step_000000007"}), (True, {6: "step_000000006", 12: "epoch_2"})],
)
def test_epochs_that_are_saved_but_not_kept_rotate_as_steps(
    save_most_recent: bool, expected: dict[int, str], tmp_path: Path
) -> None:
    config = TrainConfig(run=RunConfig(save_frequency=2, save_most_recent=save_most_recent))
    model = torch.nn.Linear(2, 2)
    plan = Plan(world_size=1, micro_batch=8, accum_steps=1, samples_per_epoch=48, epochs=2, warmup_steps=0)
    optimizer = torch.optim.AdamW(model.parameters())
    saver = Saver(None, model, optimizer, config, plan, None, {})  # type: ignore[arg-type]
    assert {done: saver._name(done, plan.epoch_of(done)) for done in expected} == expected
