"""The snapshot of a checkpoint: tensors copied to host memory, which is all that the training waits for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class HostCopy:
    """Host memory for a snapshot, kept from one save to the next; page-locked when the tensors are on a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def reserve(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Allocate, and touch every page: the first touch costs far more than the copy itself."""
        for file, tensors in files.items():
            for key, tensor in tensors.items():
                self.buffer(file, key, tensor).zero_()

    def copy(self, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """The same names with copies on the host, complete on return; overwritten by the next call."""
        copies: dict[str, dict[str, Tensor]] = {}
        from_gpu = False
        for file, tensors in files.items():
            copies[file] = {}
            # One at a time, and once: of a sharded model each tensor is gathered here, and exists no longer than this.
            for key, tensor in tensors.items():
                copies[file][key] = self.buffer(file, key, tensor).copy_(tensor.detach(), non_blocking=True)
                from_gpu |= tensor.is_cuda
        if from_gpu:
            # Host sync: the copies must have arrived before the optimiser goes on changing their sources.
            torch.cuda.synchronize()
        return copies

    def buffer(self, file: str, key: str, tensor: Tensor) -> Tensor:
        """The memory for a tensor like this one under these names."""
        buffer = self._buffers.get((file, key))
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[file, key] = buffer
        return buffer
