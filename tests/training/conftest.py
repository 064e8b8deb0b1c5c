"""What the tests of checkpoints share: a rank without a process group, and small states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from training.checkpoint_files import write_checkpoint
from training.pulse import Pulse


@dataclass(frozen=True)
class FakeWorld:
    """The part of a World that checkpoints use."""

    is_main: bool = True
    size: int = 1
    pulse: Pulse = field(default_factory=Pulse)

    def on_main(
        self, function: Callable[[], Any], what: str = "", should_stop: Callable[[], bool] | None = None
    ) -> Any:
        return function()

    on_main_at_length = on_main


@pytest.fixture
def world() -> FakeWorld:
    """The main rank of a world of one."""
    return FakeWorld()


@pytest.fixture
def second_rank() -> FakeWorld:
    """A rank that owns no files."""
    return FakeWorld(is_main=False, size=2)


def tensors_of(step: int) -> dict[str, Tensor]:
    """A tiny state that says which step it belongs to."""
    return {"weight": torch.full((3, 5), float(step)), "scale": torch.tensor(float(step))}


@pytest.fixture
def write_step(tmp_path: Path) -> Callable[..., Path]:
    """`write_step("step_000000007", 7)` writes a small checkpoint into `tmp_path` and returns its folder."""

    def write(name: str, step: int, epoch: int = 0) -> Path:
        folder = tmp_path / name
        write_checkpoint(
            folder, {"model.safetensors": tensors_of(step)}, {"a.json": {"n": step}}, step=step, epoch=epoch
        )
        return folder

    return write
