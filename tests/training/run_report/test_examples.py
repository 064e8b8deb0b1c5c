"""What is found in the features: order, ties, ranks, and no more samples than asked for."""

from __future__ import annotations

import io
from collections.abc import Iterator

import torch
from PIL import Image

from data import EvalBatch
from training.run_report.examples import Hit, first_samples, nearest, spread, thumbnail


def _features(*angles: float) -> torch.Tensor:
    radians = torch.tensor(angles).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def test_the_nearest_come_first_and_the_right_one_is_told_with_its_rank_though_it_is_far() -> None:
    keys = _features(60, 10, 20, 30, 40, 50, 90)
    (query,) = nearest(_features(0), keys, torch.tensor([6]), torch.arange(7), [0])
    assert [hit.index for hit in query.hits] == [1, 2, 3, 4, 5]
    assert query.right == Hit(6, query.right.score, True) and query.rank == 7
    assert abs(query.right.score) < 1e-6 and not any(hit.is_right for hit in query.hits)


def test_equal_scores_are_ranked_by_place_and_one_of_several_right_ones_is_enough() -> None:
    keys = _features(30, 30, 30)
    (query,) = nearest(_features(30), keys, torch.tensor([1]), torch.tensor([0, 1, 1]), [0])
    assert [hit.index for hit in query.hits] == [0, 1, 2]
    assert [hit.is_right for hit in query.hits] == [False, True, True]
    assert (query.rank, query.right.index) == (2, 1)


def test_examples_are_spread_over_the_set() -> None:
    assert spread(100, 4) == [0, 25, 50, 75]
    assert spread(3, 8) == [0, 1, 2]


def test_only_the_first_samples_are_read_and_the_reader_is_closed() -> None:
    events: list[str] = []

    def read(*_: object) -> Iterator[EvalBatch]:
        try:
            for first in range(0, 100, 4):
                events.append(f"read {first}")
                yield EvalBatch(torch.zeros(4, 1), torch.arange(first, first + 4), captions=[str(first)] * 4)
        finally:
            events.append("closed")

    batches = list(first_samples(read, lambda image: torch.empty(0), pool=6))
    assert [batch.indices.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5]]
    assert batches[1].captions == ["4", "4"] and len(batches[1].images) == 2
    assert events == ["read 0", "read 4", "closed"]


def test_thumbnails_are_small_jpegs_in_the_right_shape() -> None:
    with Image.open(io.BytesIO(thumbnail(torch.full((3, 200, 400), 128, dtype=torch.uint8)))) as image:
        assert image.format == "JPEG" and image.size == (144, 72)
