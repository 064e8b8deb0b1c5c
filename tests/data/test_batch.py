from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from data.batch import Batch, Position, fingerprint_of
from data.config import LoaderConfig
from data.cursors import LaneCursor
from data.errors import DataConfigError
from data.urls import Source

CONFIG = LoaderConfig(sources=(Source("a", ("0.tar", "1.tar")),), batch_size=4, image_size=(8, 8), sizes=(3, 4))


def position_of(*lanes: int, total: int = 4) -> Position:
    cursors = {lane: LaneCursor(lane, 2, 3, 1024, 5, 6, 7, cuts=((1, lane),)) for lane in lanes}
    return Position(total, 1000, CONFIG.seed, fingerprint_of(CONFIG), cursors)


def make_batch(rows: int) -> Batch:
    images = torch.arange(rows * 12, dtype=torch.uint8).view(rows, 3, 2, 2)
    keys = [f"k{row}" for row in range(rows)]
    return Batch(images, torch.arange(rows)[:, None], {"erase": torch.rand(rows, 2)}, keys, ["a.tar"] * rows)


def test_a_batch_splits_into_micro_batches() -> None:
    batch = make_batch(6)
    parts = batch.split(3)
    assert [part.keys for part in parts] == [["k0", "k1"], ["k2", "k3"], ["k4", "k5"]]
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert torch.equal(torch.cat([part.draws["erase"] for part in parts]), batch.draws["erase"])
    assert all(len(part) == 2 for part in parts)


def test_a_batch_moves_to_a_device_as_a_whole() -> None:
    moved = make_batch(2).to("meta")
    assert {moved.images.device.type, moved.tokens.device.type, moved.draws["erase"].device.type} == {"meta"}
    assert moved.keys == ["k0", "k1"]


def test_a_batch_that_moved_still_has_its_tokens_on_the_host() -> None:
    batch = make_batch(4)
    assert batch.host_tokens is batch.tokens
    moved = batch.to("meta")
    assert moved.host_tokens is batch.tokens
    assert [part.host_tokens.flatten().tolist() for part in moved.split(2)] == [[0, 1], [2, 3]]
    assert moved.to("meta").host_tokens is batch.tokens


def test_a_position_survives_json() -> None:
    position = position_of(0, 1, 2, 3)
    assert Position.from_json(json.loads(json.dumps(position.to_json()))) == position


def test_the_position_of_a_run_is_that_of_its_ranks() -> None:
    assert Position.merge([position_of(2, 3), position_of(0, 1)]) == position_of(0, 1, 2, 3)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([position_of(0, 1), position_of(1, 2, 3)], "same lane"),
        ([position_of(0, 1), position_of(2)], "1 of 4 lanes are missing"),
        ([position_of(0, 1), position_of(2, 3, total=5)], "different runs"),
    ],
)
def test_positions_that_do_not_make_up_a_run_are_refused(parts: list[Position], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Position.merge(parts)


def test_a_position_of_another_layout_is_refused() -> None:
    value = position_of(0, 1, 2, 3).to_json()
    with pytest.raises(DataConfigError, match="another version"):
        Position.from_json(value | {"columns": ["lane"]})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed: 0 in the checkpoint, 1 now"),
        ({"sources": (Source("a", ("0.tar",)),), "sizes": (3,)}, "number of shards: 2 in the checkpoint, 1 now"),
        ({"sources": (Source("a", ("0.tar", "2.tar")),)}, "shard list"),
        ({"resampled": True}, "resampled: False in the checkpoint, True now"),
        ({"sizes": None}, "shard sizes: .* in the checkpoint, unknown now"),
    ],
)
def test_a_resume_on_other_data_names_what_differs(change: dict[str, object], named: str) -> None:
    position_of(0, 1, 2, 3).check(CONFIG)
    with pytest.raises(DataConfigError, match=named):
        position_of(0, 1, 2, 3).check(dataclasses.replace(CONFIG, **change))  # type: ignore[arg-type]


def test_a_resume_may_change_what_the_order_does_not_depend_on() -> None:
    other = dataclasses.replace(
        CONFIG, workers=7, batch_size=8, shuffle_budget_mib=1, sources=(Source("b", ("0.tar", "1.tar")),)
    )
    position_of(0, 1, 2, 3).check(other)
