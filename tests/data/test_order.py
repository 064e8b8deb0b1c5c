from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import (
    Order,
    Segment,
    block_bytes,
    block_samples,
    deal,
    lane_range,
    lanes_per_rank,
    read_ahead_bytes,
    schedule_rows,
)

COUNTS = st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(sum)


def walk(order: Order, lane: int, epoch: int) -> list[tuple[int, int]]:
    """(shard, sample) of a lane's epoch."""
    found, number = [], 0
    while (segment := order.segment(lane, epoch, number)) is not None:
        assert segment.stop is not None
        found += [(segment.shard, sample) for sample in range(segment.start, segment.stop)]
        number += 1
    return found


@given(COUNTS, st.integers(1, 40), st.integers(0, 3), st.integers(0, 5))
def test_an_epoch_holds_each_sample_exactly_once(counts: list[int], lanes: int, epoch: int, seed: int) -> None:
    order = Order(seed, lanes, len(counts), counts=tuple(counts))
    found = Counter(sample for lane in range(lanes) for sample in walk(order, lane, epoch))
    assert found == Counter({(shard, sample): 1 for shard, count in enumerate(counts) for sample in range(count)})


@given(st.integers(1, 500), st.integers(1, 64), st.integers(0, 3))
def test_over_the_epochs_all_lanes_get_the_same(num_samples: int, lanes: int, offset: int) -> None:
    def size(lane: int, epoch: int) -> int:
        start, stop = lane_range(num_samples, lanes, lane, epoch)
        return stop - start

    totals = [sum(size(lane, epoch + offset) for epoch in range(lanes)) for lane in range(lanes)]
    assert set(totals) == {num_samples}
    assert {size(lane, 0) - num_samples // lanes for lane in range(lanes)} <= {0, 1}


@given(st.integers(1, 200), st.integers(1, 64), st.integers(0, 63))
def test_a_lane_has_had_every_sample_after_as_many_epochs_as_there_are_lanes(
    num_samples: int, lanes: int, lane: int
) -> None:
    lane %= lanes
    ranges = [range(*lane_range(num_samples, lanes, lane, epoch)) for epoch in range(lanes)]
    assert Counter(sample for one in ranges for sample in one) == dict.fromkeys(range(num_samples), 1)


def test_shards_come_in_another_order_each_epoch() -> None:
    order = Order(0, 1, 50, counts=(1,) * 50)
    assert walk(order, 0, 0) != walk(order, 0, 1)
    assert walk(order, 0, 0) == walk(Order(0, 1, 50, counts=(1,) * 50), 0, 0)
    assert walk(order, 0, 0) != walk(Order(1, 1, 50, counts=(1,) * 50), 0, 0)


def test_without_counts_whole_shards_are_dealt() -> None:
    order = Order(0, 4, 10)
    segments = [order.segment(lane, 0, number) for lane in range(4) for number in range(3)]
    shards = [segment.shard for segment in segments if segment]
    assert sorted(shards) == list(range(10))
    assert all(segment == Segment(segment.shard, 0, None) for segment in segments if segment)


def test_draws_follow_the_weights() -> None:
    order = Order(3, 8, 4, weights=(1.0, 1.0, 2.0, 4.0))
    drawn = Counter(order.segment(lane, 0, number).shard for lane in range(8) for number in range(500))  # type: ignore[union-attr]
    assert [drawn[shard] / 4000 for shard in range(4)] == pytest.approx([1 / 8, 1 / 8, 1 / 4, 1 / 2], abs=0.03)


def test_a_shard_known_to_be_empty_is_never_drawn() -> None:
    order = Order(3, 8, 3, weights=(1.0, 1.0, 1.0), counts=(5, 0, 5))
    assert {order.segment(lane, 0, number).shard for lane in range(8) for number in range(50)} == {0, 2}  # type: ignore[union-attr]


def test_many_lanes_on_few_shards_begin_at_different_samples() -> None:
    order = Order(0, 64, 2, weights=(1.0, 1.0), counts=(1000, 1000))
    starts = {(order.segment(lane, 0, 0).shard, order.segment(lane, 0, 0).start) for lane in range(64)}  # type: ignore[union-attr]
    assert len(starts) > 55
    assert order.segment(0, 0, 1) == Segment(order.segment(0, 0, 1).shard, 0, None)  # type: ignore[union-attr]


def test_the_order_is_the_same_on_every_machine() -> None:
    """Written down once: a change here makes runs of an earlier version unable to resume."""
    drawn = Order(7, 4, 100, weights=(1.0,) * 100)
    assert [drawn.segment(lane, 0, number).shard for lane in (0, 3) for number in (0, 1, 2)] == DRAWN  # type: ignore[union-attr]
    dealt = Order(7, 2, 6, counts=(3, 1, 4, 1, 5, 9))
    assert [dealt.segment(1, 2, number) for number in (0, 1, 2, 3)] == DEALT


DRAWN = [23, 7, 9, 17, 42, 84]
DEALT = [Segment(5, 8, 9), Segment(0, 0, 3), Segment(4, 0, 5), Segment(1, 0, 1)]


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.integers(0, 60))
def test_the_next_row_is_from_the_lane_that_gave_fewest(taken: list[int], num_rows: int) -> None:
    counts, expected = list(taken), []
    for _ in range(num_rows):
        lane = counts.index(min(counts))
        expected.append(lane)
        counts[lane] += 1
    assert schedule_rows(np.array(taken), num_rows).tolist() == expected


@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([12, 24, 36]), st.integers(1, 5))
def test_any_number_of_ranks_puts_the_same_samples_into_a_step(ranks: int, batch: int, steps: int) -> None:
    """As (lane, how many rows it had given before), with 12 lanes."""

    def batches(num_ranks: int) -> list[set[tuple[int, int]]]:
        taken, found = np.zeros(12, np.int64), []
        for _ in range(steps):
            rows: list[tuple[int, int]] = []
            for rank in range(num_ranks):
                mine = np.array(deal(range(12), num_ranks, rank))
                for lane in mine[schedule_rows(taken[mine], batch // num_ranks)]:
                    rows.append((int(lane), int(taken[lane])))
                    taken[lane] += 1
            found.append(set(rows))
        return found

    assert batches(ranks) == batches(1)


@given(st.integers(0, 100), st.integers(1, 20))
def test_dealing_leaves_nothing_out_and_is_even(count: int, parts: int) -> None:
    dealt = [deal(range(count), parts, part) for part in range(parts)]
    assert [item for part in dealt for item in part] == list(range(count))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


@pytest.mark.parametrize(
    ("batch", "lanes"),
    [(1, 1), (2, 2), (7, 7), (48, 48), (64, 64), (80, 40), (256, 64), (320, 64), (134, 67), (131, 131), (1000, 50)],
)
def test_lanes_divide_the_batch(batch: int, lanes: int) -> None:
    assert lanes_per_rank(batch) == lanes


@given(st.integers(1, 4096), st.integers(1, 64), st.integers(0, 32))
def test_blocks_and_read_ahead_keep_to_the_budget(budget: int, lanes: int, workers: int) -> None:
    block = block_bytes(budget, lanes, workers)
    per_worker = -(-lanes // max(1, min(workers, lanes)))
    if block >= 3 << 18:
        assert per_worker * (2 * block + 2 * read_ahead_bytes(block)) <= budget << 20


def test_blocks_double_their_samples_up_to_a_limit_for_ever() -> None:
    assert [block_samples(number) for number in range(8)] == [32, 64, 128, 256, 512, 1024, 1024, 1024]
    assert block_samples(10**9) == 1024


def test_the_first_blocks_are_small_and_later_ones_bounded() -> None:
    limits = [block_samples(number) for number in range(30)]
    assert limits[0] < limits[1] < limits[2]
    assert limits == sorted(limits)
    assert limits[-1] == limits[10]
