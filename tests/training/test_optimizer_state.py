from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adagrad, AdamW, Optimizer

from training.errors import CheckpointError
from training.optimizer_state import load_optimizer_tensors, optimizer_to_tensors

Build = Callable[[list[dict[str, Any]]], Optimizer]


class Net(nn.Module):
    """A matrix, a 4-D kernel in channels-last, a scalar, and one parameter that no gradient ever reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square().mean() * self.scale + self.conv(x.expand(1, 2, 4, 4)).square().mean()


def build(kind: Build, seed: int) -> tuple[Net, Optimizer, dict[Tensor, str]]:
    torch.manual_seed(seed)
    net = Net()
    named = dict(net.named_parameters())
    decayed = [parameter for parameter in named.values() if parameter.ndim > 1]
    others = [parameter for parameter in named.values() if parameter.ndim <= 1]
    optimizer = kind([{"params": others, "weight_decay": 0.0}, {"params": decayed}])
    return net, optimizer, {parameter: name for name, parameter in named.items()}


def train(net: Net, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        net(torch.randn(4, 4, generator=torch.Generator().manual_seed(step))).backward()
        optimizer.step()


class Counting(Optimizer):
    """An optimiser with Python numbers in its state, as older ones have."""

    def __init__(self, params: Any):
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["count"] = state.get("count", 0) + 1
                    state["size"] = state.get("size", 0.1) * 0.7
                    state["nothing"] = None
                    parameter.data.add_(parameter.grad, alpha=-0.01 * state["size"] / state["count"])


KINDS: dict[str, Build] = {
    "adamw": lambda groups: AdamW(groups, lr=0.01, betas=(0.9, 0.98), eps=1e-6),
    "fused adamw": lambda groups: AdamW(groups, lr=0.01, fused=True),
    "amsgrad": lambda groups: AdamW(groups, lr=0.01, amsgrad=True),
    "sgd with momentum": lambda groups: SGD(groups, lr=0.01, momentum=0.9),
    "sgd": lambda groups: SGD(groups, lr=0.01),
    "adagrad": lambda groups: Adagrad(groups, lr=0.01),
    "adafactor": lambda groups: Adafactor(groups, lr=0.01),
    "numbers": Counting,
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_restored_optimiser_goes_on_bit_for_bit(kind: Build) -> None:
    net, optimizer, names = build(kind, seed=0)
    train(net, optimizer, range(3))
    tensors = {key: tensor.clone() for key, tensor in optimizer_to_tensors(optimizer, names).items()}
    weights = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    train(net, optimizer, range(3, 6))

    other, other_optimizer, other_names = build(kind, seed=1)
    other.load_state_dict(weights)
    load_optimizer_tensors(other_optimizer, other_names, tensors)
    assert {k: v.tolist() for k, v in optimizer_to_tensors(other_optimizer, other_names).items()} == {
        key: tensor.tolist() for key, tensor in tensors.items()
    }
    train(other, other_optimizer, range(3, 6))
    for key, tensor in net.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key


def test_keys_are_slots_and_parameter_names() -> None:
    net, optimizer, names = build(KINDS["adamw"], seed=0)
    train(net, optimizer, range(1))
    tensors = optimizer_to_tensors(optimizer, names)
    assert {"exp_avg/linear.weight", "exp_avg_sq/conv.bias", "step/scale", "no_state/unused"} <= tensors.keys()
    assert tensors["exp_avg/linear.weight"].dtype == torch.float32
    assert len(tensors) == 5 * 3 + 1


def test_moments_take_the_memory_format_of_their_parameter() -> None:
    net, optimizer, names = build(KINDS["adamw"], seed=0)
    train(net, optimizer, range(1))
    tensors = {key: tensor.contiguous() for key, tensor in optimizer_to_tensors(optimizer, names).items()}
    load_optimizer_tensors(optimizer, names, tensors)
    assert optimizer.state[net.conv.weight]["exp_avg"].stride() == net.conv.weight.stride()


def test_the_loaded_state_shares_no_memory_with_its_source() -> None:
    net, optimizer, names = build(KINDS["adamw"], seed=0)
    train(net, optimizer, range(1))
    tensors = {key: tensor.clone() for key, tensor in optimizer_to_tensors(optimizer, names).items()}
    load_optimizer_tensors(optimizer, names, tensors)
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    train(net, optimizer, range(1, 3))
    assert all(torch.equal(before[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if "linear" not in k}, r"2 parameters is missing: linear\.bias"),
        (lambda t: t | {"exp_avg/stranger": torch.ones(1)}, "1 parameters is not of what is trained: stranger"),
        (lambda t: t | {"exp_avg/linear.bias": torch.ones(7)}, r"exp_avg of linear\.bias has shape \(7,\)"),
        (lambda t: {}, "6 parameters is missing"),
    ],
)
def test_a_state_of_another_model_is_refused_and_nothing_changes(change: Callable[..., Any], message: str) -> None:
    net, optimizer, names = build(KINDS["adamw"], seed=0)
    train(net, optimizer, range(1))
    tensors = {key: tensor.clone() for key, tensor in optimizer_to_tensors(optimizer, names).items()}
    _, other_optimizer, other_names = build(KINDS["adamw"], seed=0)
    with pytest.raises(CheckpointError, match=message):
        load_optimizer_tensors(other_optimizer, other_names, change(tensors))
    assert not other_optimizer.state


def test_state_that_is_neither_tensor_nor_number_is_refused() -> None:
    net, optimizer, names = build(KINDS["sgd"], seed=0)
    optimizer.state[net.scale] = {"history": [1, 2]}
    with pytest.raises(TypeError, match="list"):
        optimizer_to_tensors(optimizer, names)
