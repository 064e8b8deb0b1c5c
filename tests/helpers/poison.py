"""Runs of `training.main` in which chosen batches of one rank give NaN. Knows the step and its batch, no policy."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import training.opening
import training.run
from data import Batch
from training.main import main
from training.step import StepResult, TrainStep


@dataclasses.dataclass
class Report:
    """What a rank saw: exit code, keys of each batch in order, final weights, the poisoned rows' keys."""

    exit_code: int = -1
    keys: list[list[str]] = dataclasses.field(default_factory=list)
    poisoned: list[str] = dataclasses.field(default_factory=list)
    skipped: list[bool] = dataclasses.field(default_factory=list)
    weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)


class _Transform(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.row: int | None = None

    def forward(self, images: Tensor, draws: dict[str, Tensor]) -> Tensor:
        pixels = self.inner(images, draws)
        if self.row is not None:
            pixels[self.row] = float("nan")
        return pixels


class PoisonedStep:
    """A `TrainStep` whose batches number `batches` (from 1) are poisoned on this rank."""

    def __init__(self, step: TrainStep, batches: set[int], kind: str, report: Report):
        self._transform = _Transform(step.transform)
        self._step = dataclasses.replace(step, transform=self._transform)
        self._batches = batches
        self._kind = kind
        self._report = report
        self._gradient_is_bad = False
        next(step.model.parameters()).register_hook(lambda g: g * float("nan") if self._gradient_is_bad else g)

    def __call__(self, batch: Batch, step: int, rate: float) -> StepResult:
        self._report.keys.append(batch.keys)
        is_bad = len(self._report.keys) in self._batches
        self._transform.row = 1 if is_bad and self._kind == "features" else None
        self._gradient_is_bad = is_bad and self._kind == "gradient"
        if is_bad:
            self._report.poisoned += [batch.keys[1]] if self._kind == "features" else batch.keys
        result = self._step(batch, step, rate)
        self._report.skipped.append(bool(result.skipped))
        return result


def poisoned_run(flags: list[str], bad_rank: int, batches: set[int], kind: str) -> Report:
    """One rank of a run: `main(flags)` with the batches of `bad_rank` poisoned in their `kind`: features, gradient."""
    report = Report()
    build_step, build_learner = training.opening.build_step, training.run.build_learner

    def poisoned_step(*args: Any) -> Any:
        step = build_step(*args)
        return PoisonedStep(step, batches if step.world.rank == bad_rank else set(), kind, report)

    def kept_learner(*args: Any) -> Any:
        learner = build_learner(*args)
        report.weights = learner.model.state_dict()
        return learner

    learner_kept = mock.patch.object(training.run, "build_learner", kept_learner)
    with mock.patch.object(training.opening, "build_step", poisoned_step), learner_kept:
        report.exit_code = main(flags)
    report.weights = {key: torch.clone(value) for key, value in report.weights.items()}
    return report
