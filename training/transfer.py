"""Batches from the host to the device, beside the computation. Knows no model and no order of samples."""

from __future__ import annotations

import torch

from data import Batch


class Transfer:
    """Copies on a stream of their own where the device is a GPU.

    The host runs about a step ahead of the GPU, so a copy that need not queue behind the kernels of the running
    step is over before the next one begins; nothing has to be fetched ahead for it. Pinned memory returns to its
    allocator only when the copy is done.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device; what is called next on the current stream sees it complete."""
        if self._stream is None:
            return batch.to(self._device, non_blocking=True)
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in (moved.images, moved.tokens, *moved.draws.values()):
            # Allocated for the copying stream: its memory must not be given away while the step still reads it.
            tensor.record_stream(current)
        return moved
