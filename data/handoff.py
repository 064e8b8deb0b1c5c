"""How pixels cross from a worker to the loader: through buffers that are mapped once and used in turn.

Knows no samples and no batches. Fresh shared memory for every part would cost more than filling it: it is
allocated, cleared, sent as a file descriptor and mapped page by page, on both sides, each time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(slots=True)
class Pixels:
    """The first `rows` rows of buffer number `slot`; the buffer itself travels only if the loader cannot know it."""

    slot: int
    rows: int
    buffer: torch.Tensor | None  # uint8 [rows or more, 3, H, W]

    def array(self) -> np.ndarray:
        """uint8 [rows, 3, H, W], valid until the worker fills the buffer again."""
        assert self.buffer is not None, "not restored"
        return self.buffer.numpy()[: self.rows]


class Sender:
    """The worker's end. `num_slots`: how many parts are under way at a time, the one being filled included."""

    def __init__(self, image_size: tuple[int, int], num_slots: int, share_memory: bool):
        self._shape = (3, *image_size)
        self._buffers: list[torch.Tensor | None] = [None] * num_slots
        self._next = 0
        self._share_memory = share_memory

    def take(self, rows: int) -> tuple[Pixels, np.ndarray]:
        """What to send of the next `rows` rows, and where to put them [rows, 3, H, W]; overwrites the oldest part."""
        slot, self._next = self._next, (self._next + 1) % len(self._buffers)
        buffer = self._buffers[slot]
        if buffer is not None and len(buffer) >= rows:
            return Pixels(slot, rows, None if self._share_memory else buffer), buffer.numpy()[:rows]
        self._buffers[slot] = buffer = self._new(rows)
        return Pixels(slot, rows, buffer), buffer.numpy()

    def _new(self, rows: int) -> torch.Tensor:
        shape = (rows, *self._shape)
        if not (self._share_memory and rows):
            return torch.empty(shape, dtype=torch.uint8)
        # Without a name, unlike torch's: a worker that is killed leaves nothing, and /dev/shm's size is no limit.
        num_bytes = int(np.prod(shape))
        memory = os.memfd_create("clipyard")
        try:
            os.ftruncate(memory, num_bytes)
            storage = torch.UntypedStorage._new_shared_fd_cpu(memory, num_bytes)  # type: ignore[attr-defined]
        finally:
            os.close(memory)
        return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


class Receiver:
    """The loader's end of one worker."""

    def __init__(self) -> None:
        self._buffers: dict[int, torch.Tensor] = {}

    def restore(self, pixels: Pixels) -> None:
        """Puts the buffer back that did not travel."""
        if pixels.buffer is None:
            pixels.buffer = self._buffers[pixels.slot]
        else:
            self._buffers[pixels.slot] = pixels.buffer
