"""The cursors of many lanes as one table of numbers. Knows no order and no files.

A run of thousands of ranks has hundreds of thousands of lanes: as objects they cost seconds and hundreds of MiB at
every checkpoint, as columns milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np


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


_NUMBERS = LaneCursor._fields[:-1]


class CursorTable(Mapping[int, LaneCursor]):
    """Stream -> cursor, in ascending order of the streams; cuts, of which there are few, stand apart."""

    def __init__(self, streams: np.ndarray, numbers: np.ndarray, cuts: dict[int, tuple[tuple[int, int], ...]]):
        """streams: int64 [n], ascending; numbers: int64 [n, 7]."""
        self._streams = streams
        self._numbers = numbers
        self._cuts = cuts

    @classmethod
    def of(cls, cursors: Mapping[int, LaneCursor]) -> CursorTable:
        """The same cursors as a table."""
        if isinstance(cursors, CursorTable):
            return cursors
        streams = sorted(cursors)
        numbers = np.array([cursors[stream][:-1] for stream in streams], dtype=np.int64)
        cuts = {stream: cursors[stream].cuts for stream in streams if cursors[stream].cuts}
        return cls(np.array(streams, dtype=np.int64), numbers.reshape(-1, len(_NUMBERS)), cuts)

    @classmethod
    def concat(cls, tables: Sequence[Self]) -> Self:
        """All rows of `tables`. ValueError where two have the same stream."""
        streams = np.concatenate([table._streams for table in tables])
        order = np.argsort(streams, kind="stable")
        streams = streams[order]
        if (streams[1:] == streams[:-1]).any():
            raise ValueError("two ranks hold the same lane")
        numbers = np.concatenate([table._numbers for table in tables])[order]
        return cls(streams, numbers, {stream: cut for table in tables for stream, cut in table._cuts.items()})

    def __getitem__(self, stream: int) -> LaneCursor:
        row = int(np.searchsorted(self._streams, stream))
        if row >= len(self._streams) or self._streams[row] != stream:
            raise KeyError(stream)
        return LaneCursor._make([*self._numbers[row].tolist(), self._cuts.get(stream, ())])

    def __iter__(self) -> Iterator[int]:
        return iter(self._streams.tolist())

    def __len__(self) -> int:
        return len(self._streams)

    def to_json(self) -> dict[str, Any]:
        """Columns by name."""
        columns = {"stream": self._streams.tolist()}
        columns |= {name: self._numbers[:, at].tolist() for at, name in enumerate(_NUMBERS)}
        return {"columns": columns, "cuts": [[stream, *map(list, cuts)] for stream, cuts in self._cuts.items()]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`. ValueError for other columns than this version's."""
        columns = value.get("columns")
        if not isinstance(columns, dict) or list(columns) != ["stream", *_NUMBERS]:
            raise ValueError("unknown columns")
        streams = np.array(columns["stream"], dtype=np.int64)
        numbers = np.stack([np.array(columns[name], dtype=np.int64) for name in _NUMBERS], axis=1)
        cuts = {stream: tuple((segment, stop) for segment, stop in pairs) for stream, *pairs in value["cuts"]}
        return cls(streams, numbers, cuts)
