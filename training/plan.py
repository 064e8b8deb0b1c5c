"""Every derived number of a run, once: batches, steps, epochs, cadence. Pure; knows no files and no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from models.errors import ConfigError
from training.config import OptimConfig

DEFAULT_WARMUP_STEPS = 10_000


@dataclass(frozen=True)
class Plan:
    """micro_batch x accum_steps x world_size = global_batch; steps_per_epoch x epochs = total_steps."""

    world_size: int
    micro_batch: int
    accum_steps: int
    samples_per_epoch: int
    epochs: int
    warmup_steps: int

    @property
    def rank_batch(self) -> int:
        """Samples of one rank in one optimiser step."""
        return self.micro_batch * self.accum_steps

    @property
    def global_batch(self) -> int:
        """Samples of all ranks in one optimiser step."""
        return self.rank_batch * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch; what is left over opens the next epoch, nothing is dropped."""
        return self.samples_per_epoch // self.global_batch

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the run."""
        return self.steps_per_epoch * self.epochs

    def epoch_of(self, step: int) -> int:
        """Epochs completed after `step` steps."""
        return step // self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """True when `step` completed steps are a whole number of epochs."""
        return step % self.steps_per_epoch == 0

    def __str__(self) -> str:
        accum = f" x {self.accum_steps} accumulated" if self.accum_steps > 1 else ""
        return (
            f"{self.micro_batch} per rank{accum} x {self.world_size} ranks = {self.global_batch} samples a step, "
            f"{self.steps_per_epoch} steps an epoch, {self.epochs} epochs = {self.total_steps} steps"
        )


def make_plan(optim: OptimConfig, samples_per_epoch: int, world_size: int) -> Plan:
    """Raises ConfigError when an epoch holds less than one global batch."""
    global_batch = optim.batch_size * optim.accum_freq * world_size
    warmup_steps = _warmup_steps(optim, global_batch)
    plan = Plan(world_size, optim.batch_size, optim.accum_freq, samples_per_epoch, optim.epochs, warmup_steps)
    if plan.steps_per_epoch == 0:
        raise ConfigError(
            f"an epoch of {samples_per_epoch} samples is less than one global batch of {plan.global_batch} "
            f"({plan.micro_batch} x {plan.accum_steps} accumulated x {world_size} ranks): lower --batch-size or raise "
            "--train-num-samples"
        )
    return plan


def _warmup_steps(optim: OptimConfig, global_batch: int) -> int:
    """Whole steps in which at least the samples of the warm-up are seen, where it is given in samples."""
    if optim.warmup_samples is not None:
        return -(-optim.warmup_samples // global_batch)
    return DEFAULT_WARMUP_STEPS if optim.warmup is None else optim.warmup
