"""The moving average of the weights: its definition, its half-life in samples, standing in, and skipped steps."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from tests.training.test_update import HostSyncs, batch_of, step_of
from training import ema as ema_module
from training.ema import Ema, ema_weight

HALF_LIFE, BATCH = 64, 8
DONE, LEFT_OUT = torch.tensor(0.0), torch.tensor(1.0)


def model_with_statistics() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def move(model: nn.Module, step: int) -> None:
    """Other weights and statistics, as after a training step."""
    generator = torch.Generator().manual_seed(step)
    for tensor in model.state_dict().values():
        change = torch.randn(tensor.shape, generator=generator)
        tensor += change.to(tensor.dtype) if tensor.is_floating_point() else 1


def values(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return copy.deepcopy({name: tensor.detach() for name, tensor in state.items()})


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("chunk", [1, 64 << 20])
def test_the_average_is_the_weighted_sum_of_all_weights_so_far(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ema_module, "_CHUNK_BYTES", chunk)
    model = model_with_statistics()
    expected = {name: tensor.double() for name, tensor in model.named_parameters()}
    ema, decay = Ema(model, HALF_LIFE), 0.5 ** (BATCH / HALF_LIFE)
    for step in range(10):
        move(model, step)
        ema.update(DONE, step * BATCH, BATCH)
        for name, weight in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * weight.double()
    for name, value in expected.items():
        torch.testing.assert_close(ema.state()[name].double(), value.detach(), rtol=1e-6, atol=1e-6)


def test_statistics_of_the_batch_norm_are_the_last_ones() -> None:
    model = model_with_statistics()
    ema = Ema(model, HALF_LIFE)
    move(model, 1)
    ema.update(DONE, 0, BATCH)
    for name, buffer in model.named_buffers():
        assert torch.equal(ema.state()[name], buffer)


@pytest.mark.parametrize("batch", [8, 16, 64, 256])
def test_after_a_half_life_older_weights_count_half_at_any_global_batch(batch: int) -> None:
    steps = 256 // batch
    kept = math.prod(1 - ema_weight(256, None, step * batch, batch) for step in range(steps))
    assert kept == pytest.approx(0.5, rel=1e-12)


def test_a_ramp_up_forgets_the_initial_weights_and_then_gives_way_to_the_half_life() -> None:
    assert ema_weight(1000, 0.05, 0, 10) == 1.0
    assert ema_weight(1000, 0.05, 2000, 10) == 1 - 0.5 ** (10 / 100)
    assert ema_weight(1000, 0.05, 10**6, 10) == ema_weight(1000, None, 10**6, 10)


def test_an_update_that_was_left_out_leaves_the_average_bitwise_as_it_was() -> None:
    model = model_with_statistics()
    ema = Ema(model, HALF_LIFE)
    move(model, 1)
    ema.update(DONE, 0, BATCH)
    before = values(ema.state())
    move(model, 2)
    ema.update(LEFT_OUT, BATCH, BATCH)
    assert_equal(ema.state(), before)


def test_a_step_takes_its_weights_in_and_a_rehearsed_one_does_not() -> None:
    step = step_of("tiny-test")
    ema = Ema(step.model, HALF_LIFE)
    step = dataclasses.replace(step, ema=ema)
    before = values(ema.state())
    step.rehearse(batch_of(step))
    assert_equal(ema.state(), before)
    step(batch_of(step), 1, 1e-3)
    assert not torch.equal(ema.state()["visual.proj"], before["visual.proj"])


def test_a_gradient_that_is_not_finite_leaves_weights_and_average_as_they_were() -> None:
    step = step_of("tiny-test")
    ema = Ema(step.model, HALF_LIFE)
    step = dataclasses.replace(step, ema=ema)
    step(batch_of(step), 1, 1e-3)
    before = values(ema.state())
    step.transform.scale.fill_(torch.nan)
    assert float(step(batch_of(step), 2, 1e-3).left_out) == 1
    assert_equal(ema.state(), before)


def test_updating_waits_for_nothing() -> None:
    ema = Ema(model_with_statistics(), HALF_LIFE)
    with HostSyncs() as syncs:
        ema.update(DONE, 0, BATCH)
    assert syncs.found == []


def test_inside_the_model_computes_with_the_average_and_afterwards_with_its_weights_even_after_an_error() -> None:
    model = model_with_statistics()
    ema = Ema(model, HALF_LIFE)
    move(model, 1)
    ema.update(DONE, 0, BATCH)
    average, weights = values(ema.state()), values(model.state_dict())
    seen = {}

    def look_and_stop() -> None:
        with ema.in_place_of_weights():
            seen.update(values(model.state_dict()))
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        look_and_stop()
    assert_equal(seen, average)
    assert_equal(model.state_dict(), weights)
    assert_equal(ema.state(), average)


def test_a_saved_average_goes_on_bitwise_and_a_restart_begins_with_the_weights() -> None:
    model = model_with_statistics()
    one, other = Ema(model, HALF_LIFE), Ema(model, HALF_LIFE)
    move(model, 1)
    one.update(DONE, 0, BATCH)
    other.load(values(one.state()))
    move(model, 2)
    for ema in (one, other):
        ema.update(DONE, BATCH, BATCH)
    assert_equal(one.state(), other.state())
    one.restart()
    assert_equal(one.state(), model.state_dict())


def test_locked_weights_take_no_memory_and_are_saved_all_the_same() -> None:
    model = model_with_statistics()
    model[0].requires_grad_(False)
    ema = Ema(model, HALF_LIFE)
    assert ema.state()["0.weight"].data_ptr() == model[0].weight.data_ptr()
    assert ema.state().keys() == model.state_dict().keys()
    assert ema.num_bytes == sum(t.nbytes for n, t in model.state_dict().items() if not n.startswith("0."))
