"""The trial step: training with and without it is bitwise the same, and what does not fit is found by it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor

import data
import models
from tests.helpers.gloo import run_ranks
from training.cli import parse_args
from training.config import ClusterConfig, TrainConfig
from training.distributed import World, session
from training.learner import Learner, build_learner
from training.optimizer import parameter_names
from training.optimizer_state import optimizer_to_tensors
from training.plan import make_plan
from training.setup import build_step, cuts_padding, find_samples, loader_config, resolve_model
from training.sharding import local
from training.start import Fresh
from training.step import TrainStep
from training.trial import largest_batch, run_trial, wants_trial

ROWS = 4
BASE = [
    *("--dataset-type", "synthetic", "--train-num-samples", "64", "--batch-size", str(ROWS), "--workers", "0"),
    *("--device", "cpu", "--precision", "fp32", "--lr", "1e-3", "--warmup", "1", "--epochs", "1", "--no-preflight"),
]

CASES = {
    "ViT": ["--model", "tiny-test"],
    "ConvNeXt": ["--model", "tiny-test-timm"],
    "batch norms": ["--model", "tiny-test-rn"],
    "batch norms, accumulated": ["--model", "tiny-test-rn", "--accum-freq", "2"],
    "accumulated": ["--model", "tiny-test", "--accum-freq", "2", "--force-patch-dropout", "0.5"],
    "static graph, checkpointing": ["--model", "tiny-test", "--ddp-static-graph", "--grad-checkpointing"],
    "fp16": ["--model", "tiny-test", "--precision", "amp"],
    "clipped, erased": ["--model", "tiny-test", "--clip-grad-norm", "0.1", "--aug-cfg", "re_prob=1.0"],
    "sigmoid": ["--model", "tiny-test", "--siglip"],
}
SHARDED = {
    "FSDP": ["--model", "tiny-test", "--fsdp"],
    "FSDP, batch norms, accumulated": ["--model", "tiny-test-rn", "--fsdp", "--accum-freq", "2"],
}


@dataclass
class Trainer:
    """What `training.run` builds, without its files."""

    config: TrainConfig
    settings: data.LoaderConfig
    model: models.ModelConfig
    learner: Learner
    step: TrainStep

    def batches(self, world: World, count: int) -> Iterator[data.Batch]:
        with data.build_train_loader(self.settings, models.get_tokenizer(self.model), world.rank, world.size) as loader:
            yield from islice(iter(loader), count)


def build(flags: list[str], world: World) -> Trainer:
    config = parse_args([*BASE, *flags])
    model = resolve_model(config)
    samples = find_samples(config, world)
    settings = loader_config(config, samples, make_plan(config.optim, samples.per_epoch, world.size), model)
    learner = build_learner(config, model, Fresh("test"), None, world)
    step = build_step(config, learner, settings, model, None, cuts_padding("auto", model), world)
    return Trainer(config, settings, model, learner, step)


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """All that training changes, copied."""
    model, scale = trainer.learner.model, trainer.learner.loss_scale
    found = {name: local(tensor).detach().clone() for name, tensor in model.named_parameters()}
    found |= {f"buffer {name}": tensor.clone() for name, tensor in model.named_buffers()}
    numbers = {"torch": torch.get_rng_state(), "python": torch.tensor(hash(random.getstate()))}
    numbers["numpy"] = torch.from_numpy(np.random.get_state()[1].astype(np.int64))
    numbers["scale"] = torch.tensor([] if scale is None else list(scale.state_dict().values()))
    return found | numbers


def trained(flags: list[str], world: World, trial: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and state after three steps."""
    trainer = build(flags, world)
    if trial:
        run_trial(trainer.step, trainer.settings, trainer.model)
    losses = [float(trainer.step(batch, i, 1e-3).loss) for i, batch in enumerate(trainer.batches(world, 3))]
    optimizer = optimizer_to_tensors(trainer.learner.optimizer, parameter_names(trainer.learner.model))
    moments = {name: local(tensor).clone() for name, tensor in optimizer.items()}
    return losses, state_of(trainer) | moments


def differing(flags: list[str], world: World) -> list[str]:
    """Names of what a trial step makes different; empty when nothing."""
    (losses, state), (other_losses, other) = trained(flags, world, False), trained(flags, world, True)
    assert state.keys() == other.keys() and len(set(losses)) == 3
    names = [name for name in state if not torch.equal(state[name], other[name])]
    return names + (["losses"] if losses != other_losses else [])


@pytest.mark.parametrize("case", CASES)
def test_training_is_bitwise_the_same_with_a_trial_step(case: str) -> None:
    assert differing(CASES[case], World()) == []


def _on_ranks(cases: dict[str, list[str]]) -> dict[str, list[str]]:
    with session(ClusterConfig(device="cpu")) as world:
        return {case: differing(flags, world) for case, flags in cases.items()}


@pytest.mark.slow
def test_training_on_two_ranks_is_bitwise_the_same_with_a_trial_step() -> None:
    cases = CASES | SHARDED
    assert run_ranks(_on_ranks, 2, cases, timeout_s=240) == [{case: [] for case in cases}] * 2


@pytest.mark.parametrize("case", ["batch norms", "fp16", "ViT"])
def test_a_trial_step_leaves_everything_as_it_was_and_an_empty_optimiser(case: str) -> None:
    trainer = build(CASES[case], World())
    with torch.no_grad():
        trainer.learner.model.logit_scale.fill_(9.0)  # weights from elsewhere may lie outside of what a step allows
    before = state_of(trainer)
    run_trial(trainer.step, trainer.settings, trainer.model)
    after = state_of(trainer)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert all(p.grad is None for p in trainer.learner.model.parameters())
    assert trainer.learner.model.row_draws.keys is None
    optimizer = optimizer_to_tensors(trainer.learner.optimizer, parameter_names(trainer.learner.model))
    assert {name.split("/")[0] for name in optimizer} == {"step", "exp_avg", "exp_avg_sq"}
    assert not any(tensor.any() for tensor in optimizer.values())


def test_the_trial_step_is_as_large_as_a_step_can_be(caplog: pytest.LogCaptureFixture) -> None:
    trainer = build(["--model", "tiny-test", "--accum-freq", "5", "--aug-cfg", "re_prob=1.0"], World())
    batch = largest_batch(trainer.settings, trainer.model)
    real = next(trainer.batches(World(), 1))
    assert (batch.images.shape, batch.images.dtype) == (real.images.shape, real.images.dtype)
    assert batch.images.shape[0] == 5 * ROWS > 8
    assert {name: draw.shape for name, draw in batch.draws.items()} == {
        name: draw.shape for name, draw in real.draws.items()
    }
    assert (batch.tokens != 0).all()
    with caplog.at_level("INFO"):
        run_trial(trainer.step, trainer.settings, trainer.model)
    assert "trial step: 20 images of 32 x 32 and texts of 16 tokens in " in caplog.text


def test_a_trial_step_is_made_on_gpus_unless_told_otherwise() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert wants_trial(None, cuda) and not wants_trial(None, cpu)
    assert wants_trial(True, cpu) and not wants_trial(False, cuda)
    assert parse_args(BASE).run.trial_step is None
    assert parse_args([*BASE, "--no-trial-step"]).run.trial_step is False
