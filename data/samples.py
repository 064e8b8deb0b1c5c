"""The raw sample: what a shard holds for one image-text pair, before anything is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class SampleId(NamedTuple):
    """Where a sample stands in a run's order: enough to key its random draws and to find it again."""

    stream: int  # the lane, where sources share one order; see `data.order.streams_of`
    epoch: int
    segment: int
    sample: int  # number in the shard


@dataclass(slots=True)
class RawSample:
    """Bytes of one sample. `fields` maps lower-case extensions ("jpg", "txt", "json") to contents.

    `offset` is the byte at which the sample begins in its shard, -1 where that means nothing.
    """

    key: str
    shard: str
    index: int
    fields: dict[str, bytes]
    offset: int = -1

    @property
    def num_bytes(self) -> int:
        """Bytes held by the fields."""
        return sum(map(len, self.fields.values()))


class SampleError(Exception):
    """This sample cannot be used; `reason` is the short name under which it is counted."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
