"""One update: k micro-batches equal one batch, two ranks equal one, non-finite steps change nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import models
from data import AugmentConfig, Batch, DeviceTransform
from tests.helpers.gloo import run_ranks
from training.config import ClusterConfig, ModelConfig, OptimConfig
from training.distributed import World, session
from training.optimizer import build_optimizer
from training.parallel import parallelize
from training.sharding import local
from training.step import TrainStep

ROWS = 8


def _model(name: str = "tiny-test", patch_dropout: float = 0.0) -> models.CLIP:
    torch.manual_seed(7)
    return models.build_model(models.config_with(models.load_model_config(name), patch_dropout=patch_dropout))


def _batch(step: int, side: int = 32, context: int = 16) -> Batch:
    """The global batch of one step, the same for every world size."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, 49405, (ROWS, context), generator=generator)
    tokens[:, -1] = 49407
    images = torch.randint(0, 256, (ROWS, 3, side, side), generator=generator, dtype=torch.uint8)
    return Batch(images=images, tokens=tokens, draws={}, keys=[str(i) for i in range(ROWS)], shards=["s"] * ROWS)


def _rows(batch: Batch, rank: int, size: int) -> Batch:
    return batch.split(size)[rank]


def _step(model: nn.Module, world: World, *, accum: int = 1, precision: str = "fp32", **cluster: bool) -> TrainStep:
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3), "vit", ())
    wrapped = parallelize(model, ModelConfig(precision=precision), ClusterConfig(device="cpu", **cluster), world)
    transform = DeviceTransform((0.5,) * 3, (0.5,) * 3, AugmentConfig())
    return TrainStep(wrapped, optimizer, transform, world, 0, precision, accum, 1.0, True)


def _gradients(accum: int, name: str, patch_dropout: float = 0.0) -> dict[str, Tensor]:
    model = _model(name, patch_dropout)
    step = _step(model, World(), accum=accum)
    step(_batch(0, side=model.visual.image_size[0]), 0, 0.0)
    return {key: p.grad.clone() for key, p in model.named_parameters()}


def _assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    for name, value in want.items():
        scale = float(value.norm()) or 1.0
        assert float((got[name] - value).norm()) / scale < tolerance, name


@pytest.mark.parametrize("accum", [2, 4, 8])
def test_accumulated_gradients_equal_those_of_the_whole_batch_temperature_included(accum: int) -> None:
    _assert_close(_gradients(accum, "tiny-test"), _gradients(1, "tiny-test"), 2e-5)


def test_accumulation_repeats_the_random_draws_of_each_micro_batch() -> None:
    """With dropout the replay must see the masks of the first pass: against autograd through both at once."""
    accum = 4
    model = _model("tiny-test", patch_dropout=0.5)
    step = _step(model, World(), accum=accum)
    reference = _model("tiny-test", patch_dropout=0.5)
    whole = _step(reference, World())
    reference.train()
    outputs = [whole._forward(part, 0, i) for i, part in enumerate(_batch(0).split(accum))]
    features = [torch.cat([output[i] for output in outputs]) for i in (0, 1)]
    whole._loss(features[0], features[1], reference.logit_scale.exp()).backward()
    norm = nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    result = step(_batch(0), 0, 0.0)
    torch.testing.assert_close(result.grad_norm, norm, rtol=1e-5, atol=0)
    want = {name: p.grad for name, p in reference.named_parameters()}
    _assert_close({name: p.grad for name, p in model.named_parameters()}, want, 2e-5)


def test_batch_statistics_are_updated_once_by_an_accumulated_step() -> None:
    model = _model("tiny-test-rn")
    _step(model, World(), accum=2)(_batch(0, side=model.visual.image_size[0]), 0, 0.0)
    counts = {int(m.num_batches_tracked) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert counts == {2}  # once for each of the two micro-batches


Trained = tuple[dict[str, Tensor], list[float]]  # final weights, loss of each step


def _train(steps: int, accum: int = 1, precision: str = "fp32", name: str = "tiny-test", **cluster: bool) -> Trained:
    with session(ClusterConfig(device="cpu")) as world:
        model = _model(name)
        step = _step(model, world, accum=accum, precision=precision, **cluster)
        side = model.visual.image_size[0]
        losses = [float(step(_rows(_batch(i, side), world.rank, world.size), i, 1e-3).loss) for i in range(steps)]
        return {key: value.clone() for key, value in model.state_dict().items()}, losses


def _train_static_graph() -> Trained:
    return _train(3, ddp_static_graph=True)


@pytest.mark.parametrize("static_graph", [False, True])
def test_two_ranks_train_as_one(static_graph: bool) -> None:
    alone, losses = _train(3)
    results = run_ranks(_train_static_graph, 2) if static_graph else run_ranks(_train, 2, 3)
    for state, rank_losses in results:
        assert rank_losses == pytest.approx(losses, rel=1e-5)
        _assert_close(state, alone, 1e-4)


def test_two_ranks_with_accumulation_train_as_one_and_stay_equal() -> None:
    alone, losses = _train(3)
    results = run_ranks(_train, 2, 3, 2)
    for state, rank_losses in results:
        assert rank_losses == pytest.approx(losses, rel=1e-5)
        _assert_close(state, alone, 1e-4)
    for name, value in results[0][0].items():
        assert torch.equal(value, results[1][0][name]), name


def _poisoned(fsdp: bool) -> tuple[float, bool, float]:
    with session(ClusterConfig(device="cpu")) as world:
        model = _model()
        step = _step(model, world, fsdp=fsdp)
        before = {key: local(value).clone() for key, value in model.state_dict().items()}
        if world.rank == 1:
            step.transform.offset.fill_(float("nan"))
        result = step(_rows(_batch(0), world.rank, world.size), 0, 1e-3)
        same = all(torch.equal(local(value), before[key]) for key, value in model.state_dict().items())
        return float(result.skipped), same, float(sum(s["step"] for s in step.optimizer.state.values()))


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_value_that_is_not_finite_on_one_rank_leaves_all_ranks_unchanged(fsdp: bool) -> None:
    assert run_ranks(_poisoned, 2, fsdp) == [(1.0, True, 0.0)] * 2


def test_gradients_are_clipped_once_to_the_global_norm() -> None:
    model = _model()
    step = dataclasses.replace(_step(model, World()), clip_grad_norm=1e-3)
    result = step(_batch(0), 0, 0.0)
    norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
    assert float(result.grad_norm) > 1e-3
    torch.testing.assert_close(norm, torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_the_temperature_stays_within_its_bounds() -> None:
    model = _model()
    with torch.no_grad():
        model.logit_scale.fill_(5.0)
    result = _step(model, World())(_batch(0), 0, 1e-3)
    assert float(result.scale) == pytest.approx(100.0, rel=1e-5)


def test_autocast_keeps_parameters_gradients_and_loss_in_fp32() -> None:
    model = _model()
    step = _step(model, World(), precision="amp_bfloat16")
    result = step(_batch(0), 0, 1e-3)
    assert result.loss.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_activation_checkpointing_changes_no_gradient() -> None:
    plain, again = _model("tiny-test-timm"), _model("tiny-test-timm")
    again.set_grad_checkpointing(True)
    side = plain.visual.image_size[0]
    for model in (plain, again):
        _step(model, World())(_batch(0, side), 0, 0.0)
    want = {name: p.grad for name, p in plain.named_parameters()}
    _assert_close({name: p.grad for name, p in again.named_parameters()}, want, 1e-6)
