"""Shards and whole tensors: the state of two ranks is that of one, whoever writes and whoever reads."""

from __future__ import annotations

import torch
from torch import Tensor

import models
from tests.helpers.gloo import run_ranks
from training.config import ClusterConfig, ModelConfig, OptimConfig
from training.distributed import session
from training.optimizer import build_optimizer, parameter_names
from training.optimizer_state import load_optimizer_tensors, optimizer_to_tensors
from training.parallel import parallelize
from training.sharding import gathering, is_sharded, local, reshard

State = dict[str, Tensor]


def whole_state() -> tuple[State, State]:
    """Weights of a model, and moments that tell every row of every parameter from the others."""
    torch.manual_seed(1)
    model = models.create_model("tiny-test")
    weights = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    moments: State = {}
    for name, value in model.named_parameters():
        moments |= {f"exp_avg/{name}": torch.randn_like(value), f"exp_avg_sq/{name}": torch.rand_like(value)}
        moments[f"step/{name}"] = torch.tensor(7.0)
    return weights, moments


def there_and_back() -> tuple[State, State, int, int]:
    """Weights on rank 0 and moments on both, sharded, and gathered on rank 0, which first does not look at them."""
    weights, moments = whole_state()
    with session(ClusterConfig(device="cpu")) as world:
        torch.manual_seed(world.rank)
        model = models.create_model("tiny-test")
        if world.is_main:
            model.load_state_dict(weights)
        wrapped = parallelize(model, ModelConfig(precision="fp32"), ClusterConfig(device="cpu", fsdp=True), world)
        optimizer = build_optimizer(model, OptimConfig(), "vit", ())
        names = parameter_names(model)
        load_optimizer_tensors(optimizer, names, moments)
        with torch.no_grad():
            wrapped(image=torch.zeros(1, 3, 32, 32))
        reshard(wrapped)
        found: tuple[State, State] = ({}, {})
        for looks in (False, True):
            with gathering(model.state_dict(), optimizer_to_tensors(optimizer, names)) as (got, got_moments):
                if looks and world.is_main:
                    found = dict(got.items()), dict(got_moments.items())
        rows = sum(local(p).numel() for p in model.parameters())
        return *found, rows, sum(is_sharded(p) for p in model.parameters())


def test_a_sharded_state_is_written_and_read_whole() -> None:
    weights, moments = whole_state()
    (got, got_moments, rows, sharded), (_, _, other_rows, _) = run_ranks(there_and_back, 2)
    assert got.keys() == weights.keys() and got_moments.keys() == moments.keys()
    assert all(torch.equal(got[name], value) for name, value in weights.items())
    assert all(torch.equal(got_moments[name], value) for name, value in moments.items())
    # The temperature is whole on both.
    assert sharded == len(weights) - 1
    assert rows + other_rows == sum(value.numel() for value in weights.values()) + 1
