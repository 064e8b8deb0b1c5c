"""What a look at the data saw, and how it is told. Reads nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

_SHOWN = 3  # keys named in a line
_MIB = 1 << 20


@dataclass
class PreflightReport:
    """What the probed samples looked like; `str()` gives a few log lines."""

    shards: list[str] = field(default_factory=list)  # probed, masked for logs
    failed: dict[str, str] = field(default_factory=dict)  # probed shard -> why it cannot be read
    empty: list[str] = field(default_factory=list)  # probed shards without a sample
    keys: list[str] = field(default_factory=list)
    fields: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    image_sizes: list[tuple[int, int]] = field(default_factory=list)  # height, width
    caption_lengths: list[int] = field(default_factory=list)  # tokens with start and end, before truncation
    context_length: int = 0
    valid: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    details: dict[str, str] = field(default_factory=dict)  # reason -> first message
    filtered: int = 0  # samples that --where does not keep
    is_filtered: bool = False
    record_fields: set[str] = field(default_factory=set)  # of the samples' JSON records
    num_bytes: int = 0
    read_s: float = 0.0
    decode_s: float = 0.0

    @property
    def seen(self) -> int:
        """Samples looked at, those that --where does not keep left out."""
        return self.valid + self.skipped.total()

    @property
    def num_read(self) -> int:
        """Samples read."""
        return self.seen + self.filtered

    @property
    def share_truncated(self) -> float:
        """Share of captions longer than the model's context."""
        return sum(length > self.context_length for length in self.caption_lengths) / max(len(self.caption_lengths), 1)

    def caption_percentiles(self) -> tuple[int, int, int]:
        """Median, 95th percentile and maximum of the caption lengths in tokens."""
        p50, p95, most = np.percentile(self.caption_lengths or [0], (50, 95, 100), method="higher")
        return int(p50), int(p95), int(most)

    def __str__(self) -> str:
        lines = [f"preflight: {self.valid} of {self.seen} samples valid in {len(self.shards)} shards"]
        lines += [f"  {shard}: {reason}" for shard, reason in self.failed.items()]
        lines += [f"  {shard}: holds no sample" for shard in self.empty]
        if self.is_filtered:
            lines.append(f"  --where keeps {self.seen} of {self.num_read} samples read")
        if self.skipped:
            lines.append(f"  skipped: {counted(self.skipped)}")
        if self.keys:
            lines.append(f"  keys: {', '.join(self.keys[:_SHOWN])}, ...; fields: {', '.join(sorted(self.fields))}")
        if self.image_sizes:
            sizes = sorted(self.image_sizes, key=lambda size: size[0] * size[1])
            low, middle, high = (f"{w}x{h}" for h, w in (sizes[0], sizes[len(sizes) // 2], sizes[-1]))
            lines.append(f"  images: {counted(self.formats)}; smallest {low}, median {middle}, largest {high}")
        if self.caption_lengths:
            p50, p95, most = self.caption_percentiles()
            cut = f"{self.share_truncated:.0%} longer than the context of {self.context_length}"
            lines.append(f"  captions: {p50} tokens median, {p95} at 95 %, {most} at most; {cut}")
        if self.valid:
            lines.append(
                f"  rates of one process: {self.num_bytes / _MIB / max(self.read_s, 1e-9):.1f} MiB/s read "
                f"({self.num_bytes / self.num_read / 1024:.1f} KiB a sample), "
                f"{self.valid / max(self.decode_s, 1e-9):.0f} samples/s decoded"
            )
        return "\n".join(lines)


def counted(counter: Counter[str]) -> str:
    """The counts with their names, the most frequent first."""
    return ", ".join(f"{name} {count}" for name, count in counter.most_common())
