from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data.catalog import open_catalog
from data.config import LoaderConfig
from data.errors import DataConfigError
from data.readers import build_reader


def read_whole(train_data: str | None, **options: object) -> tuple[list[str], tuple[int, ...] | None]:
    catalog = open_catalog(train_data, **options)  # type: ignore[arg-type]
    config = LoaderConfig(
        sources=catalog.sources,
        dataset_type=catalog.dataset_type,
        batch_size=1,
        image_size=(16, 16),
        sizes=catalog.sizes,
    )
    reader = build_reader(config)
    return [raw.fields["txt"].decode() for url in config.urls for raw in reader.read(url)], catalog.sizes


def test_shards_lists_and_synthetic_sets_are_read_the_same_way(
    tmp_path: Path, shards: Callable[..., list[Path]]
) -> None:
    folder = shards([2, 3], captions=lambda i: f"c{i}")[0].parent
    (tmp_path / "l.csv").write_text("filepath\ttitle\na.jpg\tc0\nb.jpg\tc1\n")
    assert read_whole(str(folder)) == (["c0", "c1", "c2", "c3", "c4"], (2, 3))
    assert read_whole(str(tmp_path / "l.csv")) == (["c0", "c1"], (2,))
    captions, sizes = read_whole(None, dataset_type="synthetic", num_samples=1003)
    assert sizes == (1000, 3)
    assert len(set(captions)) == 1003


def test_counting_can_be_left_out(shards: Callable[..., list[Path]]) -> None:
    folder = str(shards([2, 3])[0].parent)
    assert open_catalog(folder).num_samples == 5
    assert open_catalog(folder, count=False).num_samples is None


def test_no_data_at_all_is_refused() -> None:
    with pytest.raises(DataConfigError, match="--train-data is missing"):
        open_catalog(None)
