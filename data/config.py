"""What the loader of one rank needs to know. Inert: no files, no ranks, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data.captions import CaptionConfig
from data.stream import Retry

if TYPE_CHECKING:
    from data.augment import AugmentConfig
    from data.urls import Source

MIB = 1 << 20


def _default_augmentation() -> AugmentConfig:
    from data.augment import AugmentConfig

    return AugmentConfig()


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Sources, order, preprocessing and limits of a training loader.

    batch_size: rows of this rank per optimiser step (all micro-batches together).
    sizes: samples of each shard, in the order of the sources' URLs; None where they are not known.
    num_samples: length of the synthetic set.
    where: keeps the samples whose JSON record passes (`data.where`).
    retry: how long to insist on a shard that cannot be read.
    """

    sources: tuple[Source, ...]
    batch_size: int
    image_size: tuple[int, int]  # height, width
    dataset_type: str = "webdataset"  # webdataset, csv, folder or synthetic
    resampled: bool = False
    workers: int = 0
    seed: int = 0
    interpolation: str = "bicubic"
    aug: AugmentConfig = field(default_factory=_default_augmentation)
    captions: CaptionConfig = CaptionConfig()
    where: str | None = None
    shuffle_budget_mib: int = 256  # of each worker
    max_image_pixels: int = 100_000_000
    image_decode: str = "exact"  # or fast: see data.scaled
    max_skip_fraction: float = 0.1
    num_samples: int | None = None
    csv_separator: str = "\t"
    csv_img_key: str = "filepath"
    csv_caption_key: str = "title"
    sizes: tuple[int, ...] | None = None
    retry: Retry = Retry()

    @property
    def urls(self) -> tuple[str, ...]:
        """The shards of all sources, one after the other."""
        return tuple(url for source in self.sources for url in source.urls)

    @property
    def proportions(self) -> tuple[float, ...]:
        """Shares of the sources in the samples of a mixture, not normalised; () where sources share one order."""
        return tuple(source.proportion for source in self.sources if source.proportion is not None)

    @property
    def streams_per_lane(self) -> int:
        """Streams of a lane: one, or in a mixture one for each source."""
        return len(self.proportions) or 1

    @property
    def shard_sources(self) -> tuple[int, ...]:
        """For each shard the index of its source."""
        return tuple(index for index, source in enumerate(self.sources) for _ in source.urls)
