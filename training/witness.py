"""What one rank alone sees of a step, taken before the ranks' values mix. Knows features and DDP's buckets, no loss.

One rank's NaN reaches every rank's loss through the gathered features, and every rank's gradient through the
average. Who had it first shows in the features of each row and in the gradient of each rank before it is averaged.
Everything stays on the device; nothing here waits.
"""

# No `from __future__ import annotations` here: DDP compares a hook's annotations with its own types.
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

Average = Callable[[Any, dist.GradBucket], torch.futures.Future[Tensor]]


@dataclass(frozen=True)
class Sighting:
    """This rank's part of a step, on the device."""

    bad_rows: Tensor  # bool [B]: rows whose features are not finite
    grad_norm: Tensor | None  # of this rank's gradient before averaging, 0-D; None where it cannot be seen


def average(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The mean over the ranks, as DDP's own."""
    buffer = bucket.buffer().div_(dist.get_world_size())
    reduction = dist.all_reduce(buffer, async_op=True).get_future()  # Collective:

    def ready(done: torch.futures.Future[Any]) -> Tensor:
        done.value()  # raises what went wrong
        return buffer

    return reduction.then(ready)


def average_in_bf16(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The mean over the ranks of gradients rounded to bf16: half the bytes."""
    return bf16_compress_hook(None, bucket)  # type: ignore[arg-type]


class Witness:
    """Watches the gradients of `model` if that is a DDP wrapper; `average` then makes their mean over the ranks.

    DDP takes one hook for good, so what averages in another way is passed here.
    """

    def __init__(self, model: nn.Module | None = None, average: Average = average):
        self._average = average
        self._norms: list[Tensor] = []
        self._bad_rows: Tensor | None = None
        if isinstance(model, DistributedDataParallel):
            model.register_comm_hook(self, _watch)

    def features(self, image_BE: Tensor, text_BE: Tensor) -> None:
        """Note the features of all rows of this rank's step."""
        finite_B = torch.isfinite(image_BE.detach()).all(dim=1) & torch.isfinite(text_BE.detach()).all(dim=1)
        self._bad_rows = ~finite_B

    def take(self) -> Sighting:
        """What was seen since the last call."""
        norms, self._norms = self._norms, []
        assert self._bad_rows is not None
        return Sighting(self._bad_rows, torch.stack(norms).norm() if norms else None)


def _watch(witness: Witness, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    witness._norms.append(torch.linalg.vector_norm(bucket.buffer()))
    return witness._average(None, bucket)  # Collective: DDP calls it on every rank for the same buckets
