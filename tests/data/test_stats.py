from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from data.stats import LoaderStats, check_skip_fraction


def passes(stats: LoaderStats, max_fraction: float) -> bool:
    try:
        check_skip_fraction(stats, max_fraction)
    except DataError:
        return False
    return True


@pytest.mark.parametrize(
    ("delivered", "skipped", "stops"),
    [(0, 99, False), (0, 100, True), (90, 10, False), (84, 16, False), (83, 17, True)],
)
def test_a_share_of_samples_is_judged_from_a_hundred_on(delivered: int, skipped: int, stops: bool) -> None:
    """Ten of a hundred may be lost; two standard deviations are six more."""
    assert passes(LoaderStats(delivered=delivered, skipped=Counter(no_caption=skipped)), 0.1) is not stops


@pytest.mark.parametrize(
    ("opened", "failed", "stops"), [(9, 9, False), (10, 2, False), (10, 3, True), (1000, 0, False)]
)
def test_a_share_of_shards_is_judged_from_ten_on(opened: int, failed: int, stops: bool) -> None:
    stats = LoaderStats(delivered=10_000, opened_shards=opened, failed_shards=Counter(missing=failed))
    assert passes(stats, 0.1) is not stops


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.floats(0, 1))
def test_more_losses_never_make_a_run_acceptable_again(delivered: int, skipped: int, max_fraction: float) -> None:
    if not passes(LoaderStats(delivered=delivered, skipped=Counter(odd=skipped)), max_fraction):
        fewer_good = LoaderStats(delivered=delivered - delivered // 3, skipped=Counter(odd=skipped + delivered // 3))
        assert not passes(fewer_good, max_fraction)


def test_no_loss_is_allowed_at_zero_and_any_but_all_at_one() -> None:
    assert passes(LoaderStats(delivered=1000), 0.0)
    assert not passes(LoaderStats(delivered=1000, skipped=Counter(odd=1)), 0.0)
    assert passes(LoaderStats(delivered=1, skipped=Counter(odd=1000)), 1.0)
    assert not passes(LoaderStats(skipped=Counter(odd=1000)), 1.0)


def test_the_refusal_names_reasons_most_frequent_first_with_an_example_of_each() -> None:
    stats = LoaderStats()
    for number in range(60):
        stats.skip("no_caption", f"sample {number}", "a")
    stats.skip("empty_image", "sample 7", "a")
    stats.delivered = 40
    reasons = r"60 no_caption, e\.g\. sample 0; 1 empty_image, e\.g\. sample 7"
    with pytest.raises(
        DataError, match=rf"61 of 101 samples cannot be used \({reasons}\); --max-skip-fraction is 0\.1"
    ):
        check_skip_fraction(stats, 0.1)
    failing = LoaderStats(opened_shards=10)
    for number in range(10):
        failing.fail("missing", f"{number}.tar: gone")
    with pytest.raises(DataError, match=r"10 of 10 shards cannot be read \(10 missing, e\.g\. 0\.tar: gone\)"):
        check_skip_fraction(failing, 0.1)


def test_adding_up_keeps_the_first_examples_and_all_counts() -> None:
    first, second = LoaderStats(delivered=3, opened_shards=1), LoaderStats(delivered=4, opened_shards=2, epochs=5)
    first.skip("odd", "one", "a")
    second.skip("odd", "two", "b")
    second.skip("bad", "three", "b")
    second.fail("missing", "four")
    second.source_samples["a"] += 4
    first.add(second)
    assert first == LoaderStats(
        delivered=7,
        skipped=Counter(odd=2, bad=1),
        opened_shards=3,
        failed_shards=Counter(missing=1),
        source_samples=Counter(a=4),
        source_skipped=Counter(a=1, b=2),
        examples={"odd": "one", "bad": "three", "shard missing": "four"},
    )


def test_counts_are_flat_with_totals_and_reasons() -> None:
    stats = LoaderStats(delivered=9, skipped=Counter(a=1, b=2), failed_shards=Counter(c=3), source_samples=Counter(d=9))
    assert stats.counts() == {
        "skipped_samples": 3,
        "skipped_samples/a": 1,
        "skipped_samples/b": 2,
        "skipped_shards": 3,
        "skipped_shards/c": 3,
        "samples/d": 9,
    }


def test_counts_tell_what_each_source_lost_and_what_was_not_kept() -> None:
    stats = LoaderStats(source_skipped=Counter(a=2), source_filtered=Counter(a=3, b=4))
    counts = stats.counts()
    assert (counts["skips/a"], counts["filtered/a"], counts["filtered/b"], counts["filtered_samples"]) == (2, 3, 4, 7)
