"""The towers as evaluation calls them: without gradient, features of length 1 in float32. Knows no files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from training.distributed import World
from training.evaluation.feed import ShouldStop, Stopped
from training.parallel import unwrap
from training.precision import autocast
from training.sharding import reshard

Tokenize = Callable[[list[str]], Tensor]


@contextmanager
def evaluating(model: nn.Module, world: World) -> Iterator[None]:
    """Inside: evaluation mode, no gradients, the same statistics on all ranks; then the old mode again. Collective."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if world.size > 1:
                # Running statistics of BatchNorm drift apart between ranks; the checkpoint holds rank 0's.
                for buffer in model.buffers():
                    dist.broadcast(buffer, src=0)  # Collective:
            yield
    finally:
        reshard(model)
        model.train(was_training)


def encode_images(model: nn.Module, images: Tensor, precision: str, world: World) -> Tensor:
    """Normalised pixels [B, 3, H, W] to features [B, E] on the rank's device."""
    with autocast(precision, world.device):
        features = unwrap(model)(image=images.to(world.device, non_blocking=True))[0]
    return F.normalize(features.float(), dim=-1)


def encode_texts(model: nn.Module, tokens: Tensor, precision: str, world: World) -> Tensor:
    """Token ids [B, L] to features [B, E] on the rank's device."""
    with autocast(precision, world.device):
        features = unwrap(model)(text=tokens.to(world.device, non_blocking=True))[1]
    return F.normalize(features.float(), dim=-1)


def in_shared_blocks(
    items: Sequence[str],
    block_size: int,
    encode: Callable[[Sequence[str]], Tensor],
    world: World,
    should_stop: ShouldStop | None = None,
) -> Tensor:
    """`encode` of all items, rows in their order, on the host of every rank. Collective.

    Blocks are the same for any number of ranks, and so are their bits; ranks take turns at them.
    Raises Stopped on all ranks when one is asked to stop.
    """
    blocks = [items[first : first + block_size] for first in range(0, len(items), block_size)]
    rounds = -(-len(blocks) // world.size)
    own: dict[int, Tensor] = {}
    for index in range(world.rank, rounds * world.size, world.size):
        if should_stop is not None and world.any(should_stop()):  # Collective:
            raise Stopped
        world.pulse.beat()
        # A rank without a block left repeats the last: a sharded model must be called by all ranks equally often.
        own[index] = encode(blocks[min(index, len(blocks) - 1)]).cpu()
    every = {index: rows for part in world.all_gather_object(own) for index, rows in part.items()}
    return torch.cat([every[index] for index in range(len(blocks))])
