"""What became of the samples and shards that a run has read, from the counts in its last record. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_TALLY = "train/skipped_samples"


@dataclass(frozen=True)
class SourceIntake:
    """Samples of one source: used, skipped because they cannot be used, not kept by --where.

    epochs: how often it was gone through, where its size is known.
    """

    name: str
    used: int
    skipped: int
    filtered: int
    epochs: float | None


@dataclass(frozen=True)
class Intake:
    """Counts of the whole run over all ranks; samples and shards lost by reason."""

    sources: tuple[SourceIntake, ...]
    skipped_samples: dict[str, int]
    skipped_shards: dict[str, int]

    @property
    def used(self) -> int:
        """Samples that became rows of batches."""
        return sum(source.used for source in self.sources)

    @property
    def skipped(self) -> int:
        """Samples that could not be used."""
        return sum(source.skipped for source in self.sources)


def intake_of(records: Sequence[Mapping[str, Any]]) -> Intake | None:
    """None for a run without such counts."""
    counted = [record for record in records if _TALLY in record]
    if not counted:
        return None
    last = counted[-1]
    used, skipped, filtered, epochs = (_by_name(last, kind) for kind in ("samples", "skips", "filtered", "epochs"))
    sources = tuple(
        SourceIntake(
            name, int(used.get(name, 0)), int(skipped.get(name, 0)), int(filtered.get(name, 0)), epochs.get(name)
        )
        for name in dict.fromkeys((*used, *skipped, *filtered))
    )
    return Intake(sources, _reasons(last, "skipped_samples"), _reasons(last, "skipped_shards"))


def _by_name(record: Mapping[str, Any], kind: str) -> dict[str, float]:
    prefix = f"train/{kind}/"
    return {name.removeprefix(prefix): value for name, value in record.items() if name.startswith(prefix)}


def _reasons(record: Mapping[str, Any], kind: str) -> dict[str, int]:
    """Largest first."""
    return {name: int(number) for name, number in sorted(_by_name(record, kind).items(), key=lambda item: -item[1])}
