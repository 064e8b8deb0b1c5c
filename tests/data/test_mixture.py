from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data.background import DaemonPool
from data.batch import Batch, Position
from data.catalog import Catalog, open_catalog
from data.config import LoaderConfig
from data.cursors import LaneCursor
from data.errors import DataConfigError
from data.loader import TrainLoader
from data.mixture import is_mixture
from data.order import Mixing
from data.stats import source_epochs
from data.strands import LaneOpener
from data.worker import Worker
from tests.data.test_loader import build, config_of, equal, numbers
from tests.helpers.shards import write_shards

SIZES = {"a": (20, 40), "b": (7,), "c": (1, 1, 3)}
PROPORTIONS = {"a": 3.0, "b": 2.0, "c": 1.0}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A mixture file; captions end with the sample's number: a from 0 on, b from 100, c from 200."""
    folder = tmp_path_factory.mktemp("mixture")
    for number, (name, sizes) in enumerate(SIZES.items()):
        write_shards(
            folder / name, sizes, image_size=16, captions=lambda i, n=number: f"no {100 * n + i}", sizes_json=True
        )
    entries = [{"name": name, "shards": f"{folder}/{name}", "proportion": PROPORTIONS[name]} for name in SIZES]
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump(entries))
    return str(path)


def config_of_catalog(catalog: Catalog, **changes: object) -> LoaderConfig:
    return config_of((), sources=catalog.sources, sizes=catalog.sizes, **changes)


def sources_of(batches: Sequence[Batch]) -> Counter[str]:
    return Counter("abc"[number // 100] for number in numbers(batches))


PROPORTION_LISTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


@given(PROPORTION_LISTS, st.integers(0, 2000), st.integers(0, 4095), st.integers(0, 10**9), st.integers(0, 3))
def test_a_lane_keeps_the_proportions(proportions: list[float], rows: int, lane: int, first: int, seed: int) -> None:
    mixing = Mixing(seed, tuple(proportions))
    found = Counter(mixing.stream(lane, first + row) for row in range(rows))
    assert all(abs(found[stream] - rows * p / sum(proportions)) < 5 for stream, p in enumerate(proportions))


@given(PROPORTION_LISTS, st.integers(1, 4096), st.integers(0, 10**9), st.integers(0, 3))
def test_one_row_of_all_lanes_keeps_the_proportions(proportions: list[float], lanes: int, row: int, seed: int) -> None:
    mixing = Mixing(seed, tuple(proportions))
    found = Counter(mixing.stream(lane, row) for lane in range(lanes))
    assert all(abs(found[stream] - lanes * p / sum(proportions)) < 5 for stream, p in enumerate(proportions))


@pytest.mark.parametrize("resampled", [False, True])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_samples_come_in_the_proportions_on_any_ranks(mixture: str, world: int, resampled: bool) -> None:
    config = config_of_catalog(open_catalog(mixture), resampled=resampled, batch_size=48 // world)
    loaders = [build(config, rank, world) for rank in range(world)]
    steps = [[next(loader) for loader in loaders] for _ in range(10)]
    found = sources_of([batch for step in steps for batch in step])
    assert all(abs(found[name] - 80 * p) <= 3 for name, p in PROPORTIONS.items()), found
    if world > 1:
        with build(dataclasses.replace(config, batch_size=48)) as alone:
            for step in steps:
                assert Counter(numbers(step)) == Counter(numbers([next(alone)]))
    stats = [loader.stats().counts() for loader in loaders]
    assert {name: sum(one[f"samples/{name}"] for one in stats) for name in SIZES} == found


@pytest.mark.parametrize("lanes", [1, 3, 12])
def test_without_replacement_each_source_has_epochs_of_its_own(mixture: str, lanes: int) -> None:
    config = config_of_catalog(open_catalog(mixture))
    opener = LaneOpener(config, lanes, 1 << 16, DaemonPool(2, "test"))
    found: Counter[tuple[str, int, str]] = Counter()
    for number in range(lanes):
        lane = opener.open(number, dict.fromkeys(range(lanes * 3), LaneCursor()))
        while min(cursor.epoch for cursor in lane.cursors) < 2:
            one, raw, shard, _ = lane.next_sample()
            lane.count_row()
            if one.epoch < 2:
                found[config.sources[config.shard_sources[shard]].name, one.epoch, raw.key] += 1
    expected = {(name, e, f"{i:08d}"): 1 for name, sizes in SIZES.items() for e in range(2) for i in range(sum(sizes))}
    assert found == expected


@settings(max_examples=6, deadline=None)
@given(
    ranks=st.sampled_from([1, 2, 4]),
    later_ranks=st.sampled_from([1, 2, 3, 4]),
    steps=st.integers(0, 12),
    resampled=st.booleans(),
)
def test_a_resumed_mixture_goes_on(mixture: str, ranks: int, later_ranks: int, steps: int, resampled: bool) -> None:
    config = config_of_catalog(open_catalog(mixture), resampled=resampled, batch_size=12 // ranks)
    loaders = [build(config, rank, ranks) for rank in range(ranks)]
    for _ in range(steps):
        _step(loaders)
    position = Position.merge([loader.position() for loader in loaders])
    position = Position.from_json(json.loads(json.dumps(position.to_json())))
    resumed = [
        build(dataclasses.replace(config, batch_size=12 // later_ranks), rank, later_ranks, position)
        for rank in range(later_ranks)
    ]
    for _ in range(4):
        expected, found = _step(loaders), _step(resumed)
        if later_ranks == ranks:
            assert all(equal(one, other) for one, other in zip(expected, found, strict=True))
        elif later_ranks != 3:
            assert Counter(numbers(expected)) == Counter(numbers(found))


def _step(loaders: Sequence[TrainLoader]) -> list[Batch]:
    return [next(loader) for loader in loaders]


@pytest.mark.parametrize("count", [2, 5])
def test_workers_leave_no_trace_in_a_mixture(mixture: str, count: int) -> None:
    from data.loader import _assemble

    with build(config_of_catalog(open_catalog(mixture)), 1, 2) as loader:
        workers = [Worker(loader._plan, index, count).parts() for index in range(count)]
        for _ in range(6):
            assert equal(_assemble([next(parts) for parts in workers], 12), next(loader))


def test_a_changed_proportion_is_named_at_a_resume(mixture: str) -> None:
    config = config_of_catalog(open_catalog(mixture))
    changed = tuple(dataclasses.replace(source, proportion=1.0) for source in config.sources)
    with pytest.raises(DataConfigError, match="proportions: 3:2:1 in the checkpoint, 1:1:1 now"):
        build(dataclasses.replace(config, sources=changed), position=build(config).position())


def test_epochs_of_a_source_count_what_was_used_lost_and_not_kept() -> None:
    counts = {"samples/a": 60, "skips/a": 20, "filtered/a": 40, "samples/b": 3}
    assert source_epochs(counts, {"a": 60, "b": 6, "c": 5, "d": 0}) == {
        "epochs/a": 2.0,
        "epochs/b": 0.5,
        "epochs/c": 0.0,
    }


def test_the_sizes_of_the_sources_are_known_by_name(mixture: str) -> None:
    assert open_catalog(mixture).source_sizes == {"a": 60, "b": 7, "c": 5}


def test_a_mixture_may_stand_in_the_flag_itself(mixture: str) -> None:
    text = yaml.safe_dump(yaml.safe_load(Path(mixture).read_text()), default_flow_style=True)
    assert is_mixture(text)
    assert is_mixture(mixture)
    assert not is_mixture("pipe:cat a.yaml")
    assert open_catalog(text) == open_catalog(mixture)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("a: 1", "expected a list of sources"),
        ("[]", "expected a list of sources"),
        ("[{", "no YAML"),
        ("[3]", "source 1: expected name, shards, proportion, got 3"),
        ("[{name: a, shard: x.tar}]", "source 1: unknown key 'shard'; did you mean shards"),
        ("[{name: a b, shards: x.tar}]", "source 1: name: expected letters"),
        ("[{name: a, shards: []}]", r"source 1 \(a\): shards: expected one pattern"),
        ("[{name: a, shards: no-such.tar, proportion: 1}]", r"source 1 \(a\): .*no-such.tar"),
        ("[{name: a, shards: 's3://b/0.tar'}]", r"source 1 \(a\): proportion: expected a positive number, got None"),
        ("[{name: a, shards: 's3://b/0.tar', proportion: -1}]", "positive number, got -1"),
        (
            "[{name: a, shards: 's3://b/0.tar', proportion: 1}, {name: a, shards: 's3://b/1.tar', proportion: 1}]",
            "two sources are called 'a'",
        ),
        (
            "[{name: a, shards: 's3://b/0.tar', proportion: 1}, {name: b, shards: 's3://b/0.csv', proportion: 1}]",
            "one kind",
        ),
    ],
)
def test_a_mistake_in_a_mixture_is_named(tmp_path: Path, entries: str, message: str) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text(entries)
    with pytest.raises(DataConfigError, match=message):
        open_catalog(str(path), count=False)


def test_a_missing_mixture_and_factors_with_one_are_refused(mixture: str, tmp_path: Path) -> None:
    with pytest.raises(DataConfigError, match=r"none\.yaml: No such file"):
        open_catalog(str(tmp_path / "none.yaml"))
    with pytest.raises(DataConfigError, match="each has its proportion"):
        open_catalog(mixture, "1::2::3")
