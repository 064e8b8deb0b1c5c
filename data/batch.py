"""What the loader hands out: batches, and the position in the order that each of them stands for."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from data.config import LoaderConfig
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


class LaneCursor(NamedTuple):
    """How far a lane has come, or in a mixture one of its streams.

    Its current block begins at sample `sample` of segment `segment` in `epoch`; offset: byte of that sample in
    its shard, -1 if unknown. emitted: raw samples of the block that are gone. taken: rows it has given in all.
    cuts: (segment, stop) of segments that failed while the block was read; reading it again stops at the same
    sample even if the shard is whole by then, so the same samples make up the block and nothing of it is
    repeated or lost.
    """

    epoch: int = 0
    segment: int = 0
    sample: int = 0
    offset: int = -1
    block: int = 0
    emitted: int = 0
    taken: int = 0
    cuts: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Position:
    """Where some lanes of a run stand, and what they depend on: `fingerprint` describes sources and order.

    cursors: by stream (`data.order.streams_of`); without a mixture these are the lanes.
    """

    lanes: int  # of the whole run
    block_bytes: int
    seed: int
    fingerprint: dict[str, str]
    cursors: dict[int, LaneCursor] = field(default_factory=dict)
    streams: int = 1  # of each lane

    @staticmethod
    def merge(positions: Sequence[Position]) -> Position:
        """The position of the whole run from those of its ranks. ValueError if they differ or lanes are missing."""
        first = positions[0]
        cursors: dict[int, LaneCursor] = {}
        for position in positions:
            if position._terms() != first._terms():
                raise ValueError("positions of different runs")
            if cursors.keys() & position.cursors.keys():
                raise ValueError("two ranks hold the same lane")
            cursors |= position.cursors
        missing = first.lanes - len(cursors) // first.streams
        if missing:
            raise ValueError(f"{missing} of {first.lanes} lanes are missing")
        return dataclasses.replace(first, cursors=dict(sorted(cursors.items())))

    def to_json(self) -> dict[str, Any]:
        """Numbers, strings, lists and dictionaries only."""
        return {
            "lanes": self.lanes,
            "block_bytes": self.block_bytes,
            "seed": self.seed,
            "streams": self.streams,
            "fingerprint": dict(self.fingerprint),
            "columns": ["stream", *LaneCursor._fields],
            "cursors": [
                [stream, *cursor[:-1], [list(cut) for cut in cursor.cuts]] for stream, cursor in self.cursors.items()
            ],
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> Position:
        """The inverse of `to_json`. DataConfigError for columns that this version does not know."""
        if value.get("columns") != ["stream", *LaneCursor._fields]:
            raise DataConfigError("--resume: the checkpoint's data position was written by another version")
        cursors = {}
        for stream, *numbers, cuts in value["cursors"]:
            cursors[stream] = LaneCursor._make([*numbers, tuple((segment, stop) for segment, stop in cuts)])
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
