"""Batches of evaluation samples, round by round on all ranks. Knows no model and no figures.

Arithmetic of a batch must not depend on how many ranks share a set: images go through the tower in batches of
one size, filled up, so that a row's feature does not depend on which other rows are with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NoReturn

import torch
from torch import Tensor

from data import EvalBatch
from training.distributed import World
from training.errors import EXIT_FAILED, DataConfigError, DataError, PeerError

_DRY, _BATCH, _STOP, _ERROR = range(4)

ShouldStop = Callable[[], bool]


class Stopped(Exception):
    """A rank was asked to stop (preemption) between two batches; raised on all ranks together."""


def in_step(batches: Iterator[EvalBatch], world: World, should_stop: ShouldStop | None) -> Iterator[EvalBatch | None]:
    """One item a round on every rank, until all have run dry: its next batch, or None when only others have one.

    Equal rounds let a model whose forward pass is a collective be called by all ranks together. Raises
    Stopped on all ranks when one is asked to stop. A DataError or DataConfigError on one rank is one on all.
    """
    while True:
        batch, error, state = None, None, _DRY
        try:
            batch = next(batches, None)
            state = _DRY if batch is None else _BATCH
        except Exception as exc:
            error, state = exc, _ERROR
        if state != _ERROR and should_stop is not None and should_stop():
            state = _STOP
        agreed = world.max_int(state)  # Collective:
        if agreed == _ERROR:
            _raise_on_all(error, world)
        if agreed == _STOP:
            raise Stopped
        if agreed == _DRY:
            return
        yield batch


def _raise_on_all(error: Exception | None, world: World) -> NoReturn:
    """The first rank's error, of the same class everywhere: what is done about it must not depend on the rank."""
    kinds = (DataConfigError, DataError)
    kind = next((index for index, cls in enumerate(kinds) if isinstance(error, cls)), None)
    reports = world.all_gather_object(None if error is None else (kind, str(error)))  # Collective:
    kind, message = next(report for report in reports if report is not None)
    if kind is not None:
        raise kinds[kind](message) from error
    raise error or PeerError(f"evaluation: {message}", EXIT_FAILED)


def filled(images: Tensor | None, batch_size: int, image_size: tuple[int, int]) -> Tensor:
    """`images` [B, 3, H, W] with rows of zeros up to [batch_size, 3, H, W]; zeros alone for None."""
    if images is None:
        return torch.zeros(batch_size, 3, *image_size)
    missing = batch_size - len(images)
    return images if missing == 0 else torch.cat([images, images.new_zeros(missing, *images.shape[1:])])


def with_checked_labels(batches: Iterator[EvalBatch], num_classes: int) -> Iterator[EvalBatch]:
    """The batches; DataConfigError at the first label that no class name belongs to."""
    for batch in batches:
        assert batch.labels is not None
        wrong = (batch.labels < 0) | (batch.labels >= num_classes)
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise DataConfigError(
                f"sample {int(batch.indices[first])} of the set has label {int(batch.labels[first])}, but there are "
                f"{num_classes} class names: labels run from 0 to {num_classes - 1}, in the order of the names"
            )
        yield batch
