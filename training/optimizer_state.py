"""An optimiser's state as named tensors, and back. Knows no files and no particular optimiser.

Keys are `<slot>/<parameter name>`, e.g. `exp_avg/visual.proj`. A slot that holds a Python number is
stored as `<slot>:int/<name>` or `<slot>:float/<name>`; a parameter that has no state yet leaves
`no_state/<name>`, so that what is absent is known to be absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from training.errors import CheckpointError
from training.sharding import copy_rows

OptimizerState = dict[str, Tensor]

_NO_STATE = "no_state"
_NUMBERS: dict[type, torch.dtype] = {int: torch.int64, float: torch.float64}
_FACTORED_SLOTS = ("row_var", "col_var")


def optimizer_to_tensors(optimizer: Optimizer, names: Mapping[Tensor, str]) -> OptimizerState:
    """All per-parameter state, not copied; of a sharded parameter, shards. `names` gives every parameter its name."""
    tensors: OptimizerState = {}
    for parameter, _ in _parameters(optimizer):
        name = names[parameter]
        state = {slot: value for slot, value in optimizer.state.get(parameter, {}).items() if value is not None}
        if not state:
            tensors[f"{_NO_STATE}/{name}"] = torch.empty(0, dtype=torch.uint8)
        for slot, value in state.items():
            suffix, tensor = _encode(value)
            tensors[f"{slot}{suffix}/{name}"] = tensor
    return tensors


def load_optimizer_tensors(optimizer: Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]) -> None:
    """Give every parameter the state stored under its name, as the optimiser's own steps would have left it.

    Raises CheckpointError when names or shapes differ; the optimiser is then unchanged.
    """
    slots = _by_parameter(tensors)
    _check_names(expected={names[parameter] for parameter, _ in _parameters(optimizer)}, found=set(slots))
    states = {
        parameter: _decode_all(slots[names[parameter]], parameter, group, names[parameter])
        for parameter, group in _parameters(optimizer)
    }
    for parameter, state in states.items():
        optimizer.state[parameter] = state


def _parameters(optimizer: Optimizer) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, group


def _encode(value: Any) -> tuple[str, Tensor]:
    if isinstance(value, Tensor):
        return "", value.detach()
    if type(value) in _NUMBERS:
        return f":{type(value).__name__}", torch.tensor(value, dtype=_NUMBERS[type(value)])
    raise TypeError(f"optimiser state of type {type(value).__name__} cannot be stored")


def _by_parameter(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    slots: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        slot, _, name = key.partition("/")
        of_parameter = slots.setdefault(name, {})
        if slot != _NO_STATE:
            of_parameter[slot] = tensor
    return slots


def _check_names(expected: set[str], found: set[str]) -> None:
    for what, names in (("missing", expected - found), ("not of what is trained", found - expected)):
        if names:
            first = ", ".join(sorted(names)[:3])
            raise CheckpointError(
                f"optimiser state of {len(names)} parameters is {what}: {first} ...; a run resumes with "
                "the parts locked that were, and one that trains others begins from its weights (--pretrained and "
                "another --name)"
            )


def _decode_all(slots: Mapping[str, Tensor], parameter: Tensor, group: dict[str, Any], name: str) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for key, tensor in slots.items():
        slot, _, number = key.partition(":")
        if tensor.ndim > 0 and tensor.shape != parameter.shape and slot not in _FACTORED_SLOTS:
            shapes = f"{tuple(tensor.shape)}, the parameter {tuple(parameter.shape)}"
            raise CheckpointError(f"optimiser state {slot} of {name} has shape {shapes}")
        state[slot] = tensor.item() if number else _place(slot, tensor, parameter, group)
    return state


def _place(slot: str, tensor: Tensor, parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """A copy where the optimiser wants it: step counts on the host unless its kernel reads them on the device."""
    if tensor.shape == parameter.shape and tensor.ndim > 0:
        # The parameter's memory format too: the fast multi-tensor kernels want equal strides.
        placed = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False)
        copy_rows(placed, tensor)
        return placed
    on_host = slot == "step" and not (group.get("fused") or group.get("capturable"))
    return tensor.to("cpu" if on_host else parameter.device, copy=True)
