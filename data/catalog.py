"""From the flags that name the data to what a loader takes: shards of any kind, and the samples in each."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from data.errors import DataConfigError
from data.folder_source import folder_shards
from data.mixture import is_mixture, read_mixture
from data.rows import CsvConfig, CsvFields
from data.sizes import count_samples
from data.synthetic import synthetic_shards
from data.table import table_shards
from data.urls import Source, dataset_type_of, expand_sources


@dataclass(frozen=True)
class Catalog:
    """What is to be read. `sizes`: samples of each shard in the order of the sources' URLs, None where unknown."""

    dataset_type: str  # webdataset, csv, folder or synthetic
    sources: tuple[Source, ...]
    sizes: tuple[int, ...] | None

    @property
    def num_samples(self) -> int | None:
        """Samples of all shards together, as far as known."""
        return None if self.sizes is None else sum(self.sizes)

    @property
    def source_sizes(self) -> dict[str, int]:
        """Samples of each source by its name; empty where they are not known."""
        if self.sizes is None:
            return {}
        counts = iter(self.sizes)
        return {source.name: sum(itertools.islice(counts, len(source.urls))) for source in self.sources}


def open_catalog(
    train_data: str | None,
    factors: str | None = None,
    dataset_type: str = "auto",
    num_samples: int | None = None,
    csv_fields: CsvFields | None = None,
    count: bool = True,
) -> Catalog:
    """The catalog of `--train-data` and `--dataset-type`; `num_samples` is the length of a synthetic set.

    With `count=False` tars are not counted: shards drawn with replacement need no counts, and walking many
    thousands of local tars takes minutes. Raises DataConfigError as `expand_sources`, `table_shards` and
    `folder_shards` do.
    """
    if dataset_type == "synthetic":
        source, sizes = synthetic_shards(num_samples or 0)
        return Catalog(dataset_type, (source,), sizes)
    if not train_data:
        raise DataConfigError(
            "--train-data is missing: name shards or a list of pictures, or choose --dataset-type synthetic"
        )
    sources = sources_of(train_data, factors, dataset_type)
    named = "::".join(source.urls[0] for source in sources) if is_mixture(train_data) else train_data
    kind = dataset_type_of(named) if dataset_type == "auto" else dataset_type
    if kind == "csv":
        return Catalog(kind, *table_shards(sources, csv_fields or CsvConfig()))
    if kind == "folder":
        return Catalog(kind, *folder_shards(sources))
    return Catalog(kind, sources, count_samples(sources) if count else None)


def sources_of(train_data: str, factors: str | None = None, dataset_type: str = "auto") -> tuple[Source, ...]:
    """The sources of `--train-data`, of a mixture or joined by `::`; raises DataConfigError."""
    if not is_mixture(train_data):
        return expand_sources(train_data, factors, dataset_type)
    if factors is not None:
        raise DataConfigError(
            "--train-data-upsampling-factors is for sources joined by ::; in a mixture each has its proportion"
        )
    return read_mixture(train_data)
