"""What the loader hands out: batches, and the position in the order that each of them stands for."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from data.config import LoaderConfig
from data.cursors import CursorTable, LaneCursor
from data.errors import DataConfigError


@dataclass
class Batch:
    """Samples of one optimiser step of a rank, or a part of them.

    images: uint8 [B, 3, H, W], not normalised; tokens: int64 [B, L]; draws: random augmentation parameters,
    each [B, ...], applied by `DeviceTransform`; keys and shards name each row's sample;
    loaded_tokens: the tokens before `to`, where they have been moved.
    """

    images: torch.Tensor
    tokens: torch.Tensor
    draws: dict[str, torch.Tensor]
    keys: list[str]
    shards: list[str]
    loaded_tokens: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def host_tokens(self) -> torch.Tensor:
        """The tokens where the loader put them: what must be known of them waits for no device."""
        return self.tokens if self.loaded_tokens is None else self.loaded_tokens

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The batch with its tensors on `device`; from pinned memory the copies run beside the computation."""
        draws = {name: draw.to(device, non_blocking=non_blocking) for name, draw in self.draws.items()}
        images = self.images.to(device, non_blocking=non_blocking)
        tokens = self.tokens.to(device, non_blocking=non_blocking)
        return Batch(images, tokens, draws, self.keys, self.shards, self.host_tokens)

    def split(self, parts: int) -> list[Batch]:
        """`parts` micro-batches of equal size, as views of this batch; their number must divide its rows."""
        rows, rest = divmod(len(self), parts)
        assert rest == 0, f"{len(self)} rows do not split into {parts} micro-batches"
        return [self._slice(slice(start, start + rows)) for start in range(0, len(self), rows)]

    def _slice(self, rows: slice) -> Batch:
        draws = {name: draw[rows] for name, draw in self.draws.items()}
        return Batch(
            self.images[rows], self.tokens[rows], draws, self.keys[rows], self.shards[rows], self.host_tokens[rows]
        )


@dataclass(frozen=True)
class Position:
    """Where some lanes of a run stand, and what they depend on: `fingerprint` describes sources and order.

    cursors: by stream (`data.order.streams_of`); without a mixture these are the lanes.
    """

    lanes: int  # of the whole run
    block_bytes: int
    seed: int
    fingerprint: dict[str, str]
    cursors: Mapping[int, LaneCursor] = field(default_factory=dict)
    streams: int = 1  # of each lane

    @staticmethod
    def merge(positions: Sequence[Position]) -> Position:
        """The position of the whole run from those of its ranks. ValueError if they differ or lanes are missing."""
        first = positions[0]
        if any(position._terms() != first._terms() for position in positions):
            raise ValueError("positions of different runs")
        cursors = CursorTable.concat([CursorTable.of(position.cursors) for position in positions])
        missing = first.lanes - len(cursors) // first.streams
        if missing:
            raise ValueError(f"{missing} of {first.lanes} lanes are missing")
        return dataclasses.replace(first, cursors=cursors)

    def compact(self) -> Position:
        """The same with its cursors as a table, which is quick to send and to merge."""
        return dataclasses.replace(self, cursors=CursorTable.of(self.cursors))

    def to_json(self) -> dict[str, Any]:
        """Numbers, strings, lists and dictionaries only."""
        return {
            "lanes": self.lanes,
            "block_bytes": self.block_bytes,
            "seed": self.seed,
            "streams": self.streams,
            "fingerprint": dict(self.fingerprint),
            **CursorTable.of(self.cursors).to_json(),
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> Position:
        """The inverse of `to_json`. DataConfigError for columns that this version does not know."""
        try:
            cursors = CursorTable.from_json(value)
        except ValueError:
            raise DataConfigError("--resume: the checkpoint's data position was written by another version") from None
        return Position(
            value["lanes"], value["block_bytes"], value["seed"], dict(value["fingerprint"]), cursors, value["streams"]
        )

    def check(self, config: LoaderConfig) -> None:
        """DataConfigError, naming what differs, if a run of `config` cannot go on from here."""
        ours = {"seed": str(config.seed), **fingerprint_of(config)}
        theirs = {"seed": str(self.seed), **self.fingerprint}
        differing = [
            f"{name}: {theirs.get(name, 'none')} in the checkpoint, {ours.get(name, 'none')} now"
            for name in ours | theirs
            if ours.get(name) != theirs.get(name)
        ]
        if differing:
            raise DataConfigError(f"--resume: the data differ from the checkpoint's ({'; '.join(differing)})")

    def _terms(self) -> tuple[Any, ...]:
        return self.lanes, self.streams, self.block_bytes, self.seed, self.fingerprint


def fingerprint_of(config: LoaderConfig) -> dict[str, str]:
    """What the order depends on besides the seed; the values are short and fit for an error message."""
    return {
        "dataset type": config.dataset_type,
        "resampled": str(config.resampled),
        "number of shards": str(len(config.urls)),
        "shard list": _digest("\n".join(config.urls)),
        "upsampling factors": "::".join(f"{source.factor:g}" for source in config.sources)
        if config.resampled
        else "none",
        "shard sizes": "unknown" if config.sizes is None else _digest(repr(tuple(config.sizes))),
        "proportions": ":".join(f"{p:g}" for p in config.proportions) if config.proportions else "none",
        "--where": config.where or "none",
    }


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
