"""What a piece of work takes: the most memory alive at once, and the bytes handed to collectives. Knows no model.

Counts by watching every operator, so it says the same on any device and needs no counters of an allocator; what
an allocator keeps beyond it (fragments, caches, workspaces of libraries) is not in it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Footprint(TorchDispatchMode):
    """A context: tensors that operators make inside are counted for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self.collective_calls: Counter[str] = Counter()
        self.collective_bytes: Counter[str] = Counter()  # of this rank's tensors
        self._live_bytes = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        known = {_pointer(tensor) for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self._count_collective(func, args)
        else:
            for tensor in _tensors(result):
                if _pointer(tensor) not in known:
                    self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        pointer = _pointer(tensor)
        if storage.nbytes() == 0 or pointer in self._seen:
            return
        self._seen.add(pointer)
        self._live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._forget, pointer, storage.nbytes()).atexit = False

    def _forget(self, pointer: int, num_bytes: int) -> None:
        self._seen.discard(pointer)
        self._live_bytes -= num_bytes

    def _count_collective(self, func: Any, args: tuple[Any, ...]) -> None:
        name = func.overloadpacket.__name__.strip("_")
        self.collective_calls[name] += 1
        self.collective_bytes[name] += max((_size_of(part) for part in args), default=0)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of all elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]


def _pointer(tensor: Tensor) -> int:
    # Of the storage, which tensors without memory have too.
    return tensor.untyped_storage()._cdata


def _size_of(part: Any) -> int:
    """A collective's input and output are arguments of it; the larger one is what moves."""
    return bytes_of(_tensors(part))
