"""What became of the samples and shards that were read, and when too many of them are lost. Knows no files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from data.errors import DataError

_MIN_SAMPLES = 100
_MIN_SHARDS = 10
_SIGMAS = 2.0


@dataclass
class LoaderStats:
    """Counts of what was consumed. `examples` holds one sample or shard for each reason."""

    delivered: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # samples, by reason
    opened_shards: int = 0
    failed_shards: Counter[str] = field(default_factory=Counter)  # by kind
    source_samples: Counter[str] = field(default_factory=Counter)  # delivered, by source
    source_skipped: Counter[str] = field(default_factory=Counter)  # samples that cannot be used, by source
    source_filtered: Counter[str] = field(default_factory=Counter)  # samples that --where does not keep, by source
    examples: dict[str, str] = field(default_factory=dict)
    epochs: int = 0  # finished by every lane of this rank; 0 when drawing with replacement

    def add(self, other: LoaderStats) -> None:
        """Adds the counts of `other`; `epochs` stays."""
        self.delivered += other.delivered
        self.skipped += other.skipped
        self.opened_shards += other.opened_shards
        self.failed_shards += other.failed_shards
        self.source_samples += other.source_samples
        self.source_skipped += other.source_skipped
        self.source_filtered += other.source_filtered
        self.examples = other.examples | self.examples

    @property
    def num_skipped(self) -> int:
        """Samples that could not be used."""
        return self.skipped.total()

    def counts(self) -> dict[str, int]:
        """Flat names for metrics; counts of ranks may be added up."""
        return {
            "skipped_samples": self.num_skipped,
            **{f"skipped_samples/{reason}": count for reason, count in self.skipped.items()},
            "skipped_shards": self.failed_shards.total(),
            **{f"skipped_shards/{kind}": count for kind, count in self.failed_shards.items()},
            **{f"samples/{name}": count for name, count in self.source_samples.items()},
            **{f"skips/{name}": count for name, count in self.source_skipped.items()},
            **({"filtered_samples": self.source_filtered.total()} if self.source_filtered else {}),
            **{f"filtered/{name}": count for name, count in self.source_filtered.items()},
        }

    def deliver(self, source: str) -> None:
        """Counts a sample of `source` that became a row of a batch."""
        self.delivered += 1
        self.source_samples[source] += 1

    def skip(self, reason: str, example: str, source: str) -> None:
        """Counts a sample of `source` that cannot be used."""
        self.skipped[reason] += 1
        self.source_skipped[source] += 1
        self.examples.setdefault(reason, example)

    def fail(self, kind: str, example: str) -> None:
        """Counts a shard that cannot be read."""
        self.failed_shards[kind] += 1
        self.examples.setdefault(f"shard {kind}", example)


def source_epochs(counts: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, float]:
    """How often each source has been gone through: samples used, lost and not kept, by its size.

    counts: as `LoaderStats.counts` gives them, of all ranks. sizes: samples of each source, where known.
    """
    kinds = ("samples", "skips", "filtered")
    return {
        f"epochs/{name}": sum(counts.get(f"{kind}/{name}", 0) for kind in kinds) / size
        for name, size in sizes.items()
        if size
    }


def check_skip_fraction(stats: LoaderStats, max_fraction: float) -> None:
    """DataError when the share of lost samples, or of failed shards, is above `max_fraction`, or nothing is left.

    A share is judged from 100 samples or 10 shards on, and must be above by two standard deviations, so that
    a run of bad luck at its start does not end a run whose data keep within the limit.
    """
    seen = stats.delivered + stats.num_skipped
    if seen >= _MIN_SAMPLES and (not stats.delivered or _is_above(stats.num_skipped, seen, max_fraction)):
        lost = _listed(stats.skipped, stats.examples, "")
        raise DataError(
            f"{stats.num_skipped} of {seen} samples cannot be used ({lost}); --max-skip-fraction is {max_fraction:g}"
        )
    failed, opened = stats.failed_shards.total(), stats.opened_shards
    if opened >= _MIN_SHARDS and _is_above(failed, opened, max_fraction):
        lost = _listed(stats.failed_shards, stats.examples, "shard ")
        raise DataError(f"{failed} of {opened} shards cannot be read ({lost}); --max-skip-fraction is {max_fraction:g}")


def _is_above(lost: int, seen: int, max_fraction: float) -> bool:
    margin = _SIGMAS * math.sqrt(max(0.0, max_fraction * (1 - max_fraction) * seen))
    return lost > max_fraction * seen + margin


def _listed(counts: Counter[str], examples: dict[str, str], prefix: str) -> str:
    """ "12 no_caption, e.g. 00012 in a.tar; 1 empty_image, e.g. ..." """
    return "; ".join(
        f"{count} {reason}, e.g. {examples.get(prefix + reason, 'unknown')}" for reason, count in counts.most_common(5)
    )
