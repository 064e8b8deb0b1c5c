from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.background import DaemonPool
from data.batch import Position
from data.cursors import LaneCursor
from data.errors import DataConfigError, DataError, ShardError
from data.lanes import Block, Keeps, Lane, LaneReader
from data.order import Order
from data.readers import TarReader
from data.samples import RawSample, SampleId

POOL = DaemonPool(2, "test")
START = LaneCursor()


class FakeReader:
    """Shards named by their number; `failures` maps a shard to the sample at which it breaks, `once` if in passing."""

    def __init__(self, counts: Sequence[int], failures: Mapping[int, int] | None = None, once: bool = False):
        self._counts = counts
        self._failures = dict(failures or {})
        self._once = once
        self.opened: list[tuple[str, int, int | None]] = []

    def read(self, url: str, start: int = 0, stop: int | None = None) -> Iterator[RawSample]:
        self.opened.append((url, start, stop))
        count = self._counts[int(url)]
        for index in range(start, count if stop is None else min(stop, count)):
            if self._failures.get(int(url)) == index:
                if self._once:
                    del self._failures[int(url)]
                raise ShardError(url, "broke", "truncated")
            yield RawSample(f"{url}/{index}", url, index, {"txt": b"x" * (10 + index % 7)})
        if self._failures.get(int(url)) == count:
            raise ShardError(url, "broke", "truncated")


def open_lane(
    order: Order,
    reader: FakeReader,
    lane: int,
    cursor: LaneCursor = START,
    block_bytes: int = 60,
    keeps: Keeps | None = None,
) -> Lane:
    urls = [str(shard) for shard in range(order.num_shards)]
    return Lane(LaneReader(order, reader, urls, lane, cursor, block_bytes, keeps=keeps), cursor, POOL)


def take(lane: Lane, count: int) -> list[SampleId]:
    found = []
    for _ in range(count):
        found.append(lane.next_sample()[0])
        lane.count_row()
    return found


def restored(cursor: LaneCursor) -> LaneCursor:
    """Through the checkpoint's JSON and back."""
    position = Position(1, 60, 0, {}, {0: cursor})
    return Position.from_json(position.to_json()).cursors[0]


COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(sum)


@settings(max_examples=60, deadline=None)
@given(counts=COUNTS, lanes=st.integers(1, 5), drawn=st.booleans(), cut=st.integers(0, 60), block=st.integers(1, 400))
def test_a_resumed_lane_goes_on_as_if_nothing_had_been(
    counts: list[int], lanes: int, drawn: bool, cut: int, block: int
) -> None:
    order = Order(0, lanes, len(counts), (1.0,) * len(counts) if drawn else None, tuple(counts))
    for number in range(lanes):
        expected = take(open_lane(order, FakeReader(counts), number, block_bytes=block), cut + 40)
        first = open_lane(order, FakeReader(counts), number, block_bytes=block)
        before = take(first, cut)
        cursor = restored(first.cursor)
        assert cursor.taken == cut
        assert before + take(open_lane(order, FakeReader(counts), number, cursor, block), 40) == expected


@settings(max_examples=40, deadline=None)
@given(counts=COUNTS, lanes=st.integers(1, 5), block=st.integers(1, 400))
def test_each_epoch_of_all_lanes_is_every_sample_once(counts: list[int], lanes: int, block: int) -> None:
    order = Order(1, lanes, len(counts), counts=tuple(counts))
    found = Counter()
    for number in range(lanes):
        lane = open_lane(order, FakeReader(counts), number, block_bytes=block)
        while (sample := lane.next_sample())[0].epoch < 3:
            found[sample[0].epoch, sample[1].key] += 1
    assert found == {(e, f"{s}/{i}"): 1 for e in range(3) for s, count in enumerate(counts) for i in range(count)}


def one_in(count: int) -> Keeps:
    """Keeps every `count`-th sample of a shard, the last of each such group."""
    return lambda raw: raw.index % count == count - 1


@settings(max_examples=60, deadline=None)
@given(
    counts=COUNTS.filter(lambda counts: max(counts) >= 3),
    lanes=st.integers(1, 5),
    drawn=st.booleans(),
    cut=st.integers(0, 30),
    block=st.integers(1, 400),
)
def test_a_filtered_lane_gives_what_is_kept_and_resumes(
    counts: list[int], lanes: int, drawn: bool, cut: int, block: int
) -> None:
    order = Order(0, lanes, len(counts), (1.0,) * len(counts) if drawn else None, tuple(counts))
    keeps = one_in(3)
    for number in range(lanes):
        expected = take(open_lane(order, FakeReader(counts), number, block_bytes=block, keeps=keeps), cut + 20)
        assert {one.sample % 3 for one in expected} == {2}
        first = open_lane(order, FakeReader(counts), number, block_bytes=block, keeps=keeps)
        before = take(first, cut)
        again = open_lane(order, FakeReader(counts), number, restored(first.cursor), block, keeps)
        assert before + take(again, 20) == expected


@settings(max_examples=20, deadline=None)
@given(counts=COUNTS.filter(lambda counts: max(counts) >= 2), lanes=st.integers(1, 5), block=st.integers(1, 400))
def test_each_epoch_of_all_filtered_lanes_is_every_kept_sample_once(counts: list[int], lanes: int, block: int) -> None:
    order = Order(1, lanes, len(counts), counts=tuple(counts))
    found = Counter()
    for number in range(lanes):
        lane = open_lane(order, FakeReader(counts), number, block_bytes=block, keeps=one_in(2))
        while (sample := lane.next_sample())[0].epoch < 3:
            found[sample[0].epoch, sample[1].key] += 1
    kept = [f"{s}/{i}" for s, count in enumerate(counts) for i in range(1, count, 2)]
    assert found == {(e, key): 1 for e in range(3) for key in kept}


def test_samples_that_are_not_kept_are_counted_by_shard() -> None:
    order = Order(0, 1, 2, counts=(5, 7))
    block = LaneReader(
        order, FakeReader([5, 7]), "01", 0, START, 10**6, first_shard=10, keeps=lambda raw: raw.index == 3
    ).read_block()
    assert block.filtered == {10: 4, 11: 6}
    assert sorted(block.shards) == [10, 11]


def test_a_filter_that_keeps_nothing_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.lanes._REJECTED_LIMIT", 50)
    lane = open_lane(Order(0, 1, 1, counts=(7,)), FakeReader([7]), 0, keeps=lambda raw: False)
    with pytest.raises(DataError, match="--where keeps none of 50 samples in a row"):
        lane.next_sample()


def test_a_block_is_shuffled_and_stays_within_the_epoch() -> None:
    order = Order(0, 1, 1, counts=(20,))
    lane = open_lane(order, FakeReader([20]), 0, block_bytes=10**6)
    epochs = [take(lane, 20) for _ in range(3)]
    assert [{one.epoch for one in ids} for ids in epochs] == [{0}, {1}, {2}]
    orders = [[one.sample for one in ids] for ids in epochs]
    assert all(sorted(one) == list(range(20)) and one != list(range(20)) for one in orders)
    assert orders[0] != orders[1]


def test_blocks_keep_to_their_bytes() -> None:
    urls = ["0"]
    reader = LaneReader(Order(0, 1, 1, weights=(1.0,)), FakeReader([1000]), urls, 0, LaneCursor(), 200)
    for _ in range(10):
        block = reader.read_block()
        sizes = [raw.num_bytes for raw in block.samples if raw]
        assert 200 <= sum(sizes) < 200 + 17


def test_a_failed_shard_is_counted_and_passed_over() -> None:
    order = Order(0, 1, 3, counts=(5, 5, 5))
    reader = LaneReader(order, FakeReader([5, 5, 5], {1: 2}), "012", 0, LaneCursor(), 10**6)
    block = reader.read_block()
    assert Counter(raw.shard for raw in block.samples if raw) == {"0": 5, "1": 2, "2": 5}
    assert [(failure.url, failure.kind) for failure in block.failures] == [("1", "truncated")]
    assert block.num_opened == 3


@pytest.mark.parametrize(("counted", "kind"), [((5, 9), "short"), (None, "empty")])
def test_shards_that_hold_less_than_promised_are_counted(counted: tuple[int, int] | None, kind: str) -> None:
    order = Order(0, 1, 2, counts=counted)
    block = LaneReader(order, FakeReader([5, 0]), "01", 0, LaneCursor(), 10**6).read_block()
    assert [(failure.url, failure.kind) for failure in block.failures] == [("1", kind)]
    assert len(block.samples) == 5


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 20), min_size=2, max_size=5),
    shard=st.integers(0, 4),
    at=st.integers(0, 20),
    cut=st.integers(1, 30),
    block=st.integers(20, 400),
)
def test_a_passing_failure_leads_to_neither_repetition_nor_hole_after_a_resume(
    counts: list[int], shard: int, at: int, cut: int, block: int
) -> None:
    """The block in which the shard broke is made up of the same samples when the shard is whole again."""
    order = Order(2, 1, len(counts), counts=tuple(counts))
    broken = {shard % len(counts): at % (counts[shard % len(counts)] + 1)}
    cut = min(cut, sum(counts) - counts[shard % len(counts)])
    uninterrupted = open_lane(order, FakeReader(counts, broken), 0, block_bytes=block)
    first = open_lane(order, FakeReader(counts, broken, once=True), 0, block_bytes=block)
    before = take(first, cut)
    cursor = restored(first.cursor)
    second = open_lane(order, FakeReader(counts), 0, cursor, block)
    after = []
    while (sample := second.next_sample()[0]).epoch == 0:
        after.append(sample)
    assert len({*before, *after}) == len(before) + len(after)
    expected = []
    while (sample := uninterrupted.next_sample()[0]).epoch == 0:
        expected.append(sample)
    # Only what had not been read yet when the run broke off can come in addition.
    assert {*expected} <= {*before, *after}


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 20), min_size=2, max_size=5),
    shard=st.integers(0, 4),
    at=st.integers(0, 20),
    cut=st.integers(1, 30),
    block=st.integers(20, 400),
)
def test_the_block_in_which_a_shard_broke_goes_on_in_the_same_order(
    counts: list[int], shard: int, at: int, cut: int, block: int
) -> None:
    order = Order(2, 1, len(counts), counts=tuple(counts))
    broken = {shard % len(counts): at % (counts[shard % len(counts)] + 1)}
    lane = open_lane(order, FakeReader(counts, broken, once=True), 0, block_bytes=block)
    take(lane, min(cut, sum(counts) - counts[shard % len(counts)]))
    cursor = restored(lane.cursor)
    resumed = open_lane(order, FakeReader(counts), 0, cursor, block)
    while (sample := lane.next_sample()[0]) and lane.cursor.block == cursor.block:
        assert resumed.next_sample()[0] == sample
    resumed.next_sample()
    assert resumed.cursor.block == lane.cursor.block


def test_a_block_resumed_twice_keeps_its_cuts() -> None:
    order = Order(0, 1, 3, counts=(5, 5, 5))
    first = open_lane(order, FakeReader([5, 5, 5], {1: 2}, once=True), 0, block_bytes=10**6)
    whole = take(first, 12)
    again = open_lane(order, FakeReader([5, 5, 5], {1: 2}, once=True), 0, block_bytes=10**6)
    cursor = START
    found: list[SampleId] = []
    for count in (3, 4, 5):
        found += take(again, count)
        cursor = restored(again.cursor)
        again = open_lane(order, FakeReader([5, 5, 5]), 0, cursor, 10**6)
    assert found == whole
    assert cursor.cuts
    block = LaneReader(order, FakeReader([5, 5, 5]), "012", 0, cursor, 10**6).read_block()
    assert not block.failures  # counted when it broke
    assert [(one.epoch, one.segment) for one in take(again, 15)].count((1, cursor.cuts[0][0])) == 5


def test_a_lane_in_a_tar_resumes_at_the_byte_of_its_block(shards: Callable[..., list[Path]]) -> None:
    begun: list[int] = []

    class Recorded(TarReader):
        def read(self, url: str, start: int = 0, stop: int | None = None, offset: int = -1) -> Iterator[RawSample]:
            begun.append(offset)
            return super().read(url, start, stop, offset)

    urls = [str(path) for path in shards([100])]
    order = Order(0, 1, 1, counts=(100,))
    first = LaneReader(order, Recorded(), urls, 0, START, 10**9)
    blocks = [first.read_block() for _ in range(2)]
    cursor = restored(blocks[1].begin)
    again = LaneReader(order, Recorded(), urls, 0, cursor, 10**9).read_block()
    assert again.samples == blocks[1].samples
    assert cursor.sample == 32
    assert begun == [-1, cursor.offset]
    assert cursor.offset > 0


def test_blocks_of_small_samples_grow_from_thirty_two() -> None:
    lane = LaneReader(Order(0, 1, 1, weights=(1.0,)), FakeReader([10_000]), "0", 0, LaneCursor(), 10**9)
    assert [len(lane.read_block().samples) for _ in range(4)] == [32, 64, 128, 256]
    late = LaneReader(Order(0, 1, 1, weights=(1.0,)), FakeReader([10_000]), "0", 0, LaneCursor(block=2), 10**9)
    assert len(late.read_block().samples) == 128


def test_a_lane_whose_shards_are_all_broken_ends_the_run() -> None:
    order = Order(0, 1, 4, weights=(1.0,) * 4)
    with pytest.raises(DataError, match=r"50 shards in a row could not be read; \d: broke \(truncated\)"):
        open_lane(order, FakeReader([5] * 4, dict.fromkeys(range(4), 0)), 0).next_sample()


def test_a_lane_whose_shards_are_all_empty_ends_the_run() -> None:
    with pytest.raises(DataError, match="holds no sample"):
        open_lane(Order(0, 1, 2), FakeReader([0, 0]), 0).next_sample()


def test_an_unforeseen_error_costs_the_shard_and_a_wrong_setting_the_run() -> None:
    class Odd(FakeReader):
        error: Exception = ZeroDivisionError("odd")

        def read(self, url: str, start: int = 0, stop: int | None = None) -> Iterator[RawSample]:
            if url == "1":
                raise self.error
            yield from super().read(url, start, stop)

    order = Order(0, 1, 2, counts=(3, 3))
    block: Block = LaneReader(order, Odd([3, 3]), "01", 0, LaneCursor(), 10**6).read_block()
    assert [(failure.kind, failure.reason) for failure in block.failures] == [("unreadable", "ZeroDivisionError: odd")]
    Odd.error = DataConfigError("no such column")
    with pytest.raises(DataConfigError):
        LaneReader(order, Odd([3, 3]), "01", 0, LaneCursor(), 10**6).read_block()
