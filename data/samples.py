"""The raw sample: what a shard holds for one image-text pair, before its picture is decoded."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# OpenCLIP's four in its order of preference, then what Pillow reads besides.
IMAGE_EXTENSIONS = ("jpg", "png", "jpeg", "webp", "jpe", "jfif", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm")


class SampleId(NamedTuple):
    """Where a sample stands in a run's order: enough to key its random draws and to find it again."""

    stream: int  # the lane, where sources share one order; see `data.order.streams_of`
    epoch: int
    segment: int
    sample: int  # number in the shard


@dataclass(slots=True)
class RawSample:
    """Bytes of one sample. `fields` maps lower-case extensions ("jpg", "txt", "json") to contents.

    `offset` is the byte at which the sample begins in its shard, -1 where that means nothing. `record` is what
    `record_of` found in the `json` member; a row of a table has it from the start.
    """

    key: str
    shard: str
    index: int
    fields: dict[str, bytes]
    offset: int = -1
    record: Any = field(default=None, repr=False, compare=False)

    @property
    def num_bytes(self) -> int:
        """Bytes held by the fields."""
        return sum(map(len, self.fields.values()))


class SampleError(Exception):
    """This sample cannot be used; `reason` is the short name under which it is counted."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def record_of(raw: RawSample) -> Any:
    """The content of the sample's `json` member, parsed once. SampleError "no_json" or "broken_json"."""
    if raw.record is None:
        raw.record = _parse_json(raw)
    return raw.record


def _parse_json(raw: RawSample) -> Any:
    if "json" not in raw.fields:
        raise SampleError("no_json", f"no member 'json'; members: {', '.join(sorted(raw.fields)) or 'none'}")
    try:
        return json.loads(raw.fields["json"].decode("utf-8-sig", errors="replace"))
    except (ValueError, RecursionError) as error:
        raise SampleError("broken_json", str(error)) from error
