from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import models
from models.row_draws import PatchDropout, RowDraws, RowDropout, RowDropPath, draw_by_rows, row_keys

CPU = torch.device("cpu")


def with_keys(first: int, count: int, seed: int = 1) -> RowDraws:
    draws = RowDraws()
    draws.keys = row_keys(seed, first, count, CPU)
    return draws


def test_numbers_are_uniform_and_differ_by_row_layer_step_and_place() -> None:
    drawn = with_keys(0, 1000).uniform(3, 1000, 500, CPU)
    assert drawn.dtype == torch.float32
    assert float(drawn.min()) >= 0 and float(drawn.max()) < 1
    counts = torch.histc(drawn, 100, 0, 1)
    chi_squared = float(((counts - 5000) ** 2 / 5000).sum())
    assert chi_squared < 99 + 5 * (2 * 99) ** 0.5
    for other in (with_keys(0, 1000).uniform(4, 1000, 500, CPU), with_keys(0, 1000, 2).uniform(3, 1000, 500, CPU)):
        assert abs(float(torch.corrcoef(torch.stack([drawn.flatten(), other.flatten()]))[0, 1])) < 0.01
    assert abs(float(torch.corrcoef(torch.stack([drawn[:-1].flatten(), drawn[1:].flatten()]))[0, 1])) < 0.01
    assert abs(float(torch.corrcoef(torch.stack([drawn[:, :-1].flatten(), drawn[:, 1:].flatten()]))[0, 1])) < 0.01
    assert len(drawn[:, 0].unique()) > 990


def test_numbers_are_the_same_on_every_machine() -> None:
    drawn = with_keys(0, 2, seed=7).uniform(5, 2, 2, CPU)
    assert (drawn * 2**24).int().tolist() == EXPECTED


EXPECTED = [[366429, 4456039], [6763598, 12905839]]


def test_a_row_draws_the_same_in_any_batch() -> None:
    whole = with_keys(0, 8).uniform(2, 8, 5, CPU)
    parts = [with_keys(first, 2).uniform(2, 2, 5, CPU) for first in (0, 2, 4, 6)]
    assert torch.equal(whole, torch.cat(parts))


def layers(draws: RowDraws) -> list[tuple[nn.Module, Tensor]]:
    patches = PatchDropout(0.5)
    patches._draws, patches._salt = draws, 3
    return [
        (RowDropout(0.3, draws, 1), torch.ones(4096, 6)),
        (RowDropPath(0.3, draws, 2), torch.ones(4096, 2, 3)),
        (patches, torch.arange(5.0).view(1, 5, 1).expand(4096, 5, 2)),
    ]


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("number", range(3))
def test_shares_and_expectation_are_those_asked_for(keyed: bool, number: int) -> None:
    layer, x = layers(with_keys(0, 4096) if keyed else RowDraws())[number]
    dropped = layer.train()(x)
    assert torch.equal(layer.eval()(x), x)
    if number == 2:
        assert dropped.shape == (4096, 3, 2)
        assert (dropped[:, 0] == 0).all()
        shares = [float((dropped[:, 1:, 0] == patch).any(dim=1).float().mean()) for patch in range(1, 5)]
        assert shares == [pytest.approx(0.5, abs=0.04)] * 4
    else:
        assert float(dropped.mean()) == pytest.approx(1.0, abs=0.03)
        assert float((dropped == 0).float().mean()) == pytest.approx(0.3, abs=0.03)
    if number == 1:
        assert all(len(row.unique()) == 1 for row in dropped[:50])


def test_timms_layers_are_replaced_and_nothing_else_changes() -> None:
    config = models.load_model_config("tiny-test-timm")
    model = models.build_model(config)
    kinds = {type(module).__name__ for module in model.modules()}
    assert "RowDropPath" in kinds
    assert "DropPath" not in kinds
    assert not [module for module in model.modules() if isinstance(module, nn.Dropout) and module.p > 0]
    again = copy.deepcopy(model)
    again.row_draws.keys = row_keys(0, 0, 2, CPU)
    assert model.row_draws.keys is None
    drop = next(module for module in again.modules() if isinstance(module, RowDropPath))
    assert drop._draws is again.row_draws


def test_models_without_dropping_layers_are_left_alone() -> None:
    linear = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0))
    before = list(linear.modules())
    draw_by_rows(linear)
    assert all(a is b for a, b in zip(before, linear.modules(), strict=True))
