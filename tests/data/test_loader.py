from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.augment import AugmentConfig
from data.batch import Batch, Position
from data.captions import CaptionConfig
from data.config import LoaderConfig
from data.errors import DataConfigError, DataError
from data.fork_server import server_pid
from data.loader import TrainLoader, _assemble, build_train_loader, run_preflight
from data.storage import Retry
from data.urls import Source
from data.worker import Worker
from tests.data.faulty_server import serve
from tests.helpers.shards import cut_tar, make_sample, write_shards

Shards = Callable[..., list[Path]]
SIZES = (1, 7, 100)


class Numbers:
    """A tokenizer for `caption_of`: the caption's number, and the environment's as the worker sees it."""

    def __call__(self, captions: list[str]) -> torch.Tensor:
        setting = int(os.environ.get("CLIPYARD_TEST_NUMBER", "0"))
        return torch.tensor([[int(caption.split()[-1]), setting] for caption in captions])


@pytest.fixture(scope="module")
def three_shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("three")
    return tuple(map(str, write_shards(folder, SIZES, image_size=16)))


def config_of(urls: Sequence[str | Path], **changes: object) -> LoaderConfig:
    source = Source("set", tuple(map(str, urls)))
    aug = AugmentConfig(re_prob=0.5, color_jitter=0.3)
    config = LoaderConfig(sources=(source,), batch_size=12, image_size=(8, 8), aug=aug, shuffle_budget_mib=1)
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def build(config: LoaderConfig, rank: int = 0, world: int = 1, position: Position | None = None) -> TrainLoader:
    return build_train_loader(config, Numbers(), rank, world, position)


def take(loader: TrainLoader, count: int) -> list[Batch]:
    return [next(loader) for _ in range(count)]


def numbers(batches: Sequence[Batch]) -> list[int]:
    return [int(number) for batch in batches for number in batch.tokens[:, 0]]


def equal(a: Batch, b: Batch) -> bool:
    tensors = [(a.images, b.images), (a.tokens, b.tokens), *((a.draws[name], b.draws[name]) for name in a.draws)]
    return all(torch.equal(x, y) for x, y in tensors) and (a.keys, a.shards) == (b.keys, b.shards)


def test_batches_hold_what_the_shards_hold(three_shards: tuple[str, ...]) -> None:
    with build(config_of(three_shards, sizes=SIZES)) as loader:
        batch = next(loader)
    assert batch.images.shape == (12, 3, 8, 8)
    assert batch.images.dtype == torch.uint8
    assert batch.tokens.dtype == torch.int64
    assert set(batch.draws) == {"erase", "jitter"}
    assert [int(key) for key in batch.keys] == numbers([batch])
    assert set(batch.shards) <= set(three_shards)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_an_epoch_on_any_ranks_is_every_sample_once(three_shards: tuple[str, ...], world: int) -> None:
    config = config_of(three_shards, sizes=SIZES, batch_size=36 // world)
    loaders = [build(config, rank, world) for rank in range(world)]
    steps = [Counter(numbers([next(loader) for loader in loaders])) for _ in range(6)]
    assert sum(steps[:3], Counter()) == dict.fromkeys(range(108), 1)
    assert sum(steps[3:], Counter()) == dict.fromkeys(range(108), 1)
    if world > 1:  # a step's samples do not depend on the number of ranks
        with build(dataclasses.replace(config, batch_size=36)) as alone:
            assert steps[0] == Counter(numbers([next(alone)]))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_the_number_of_workers_leaves_no_trace(three_shards: tuple[str, ...], count: int) -> None:
    """Four ranks, each of whose workers is called in turn, as DataLoader does it."""
    config = config_of(three_shards, sizes=SIZES, batch_size=9)
    for rank in range(4):
        with build(config, rank, 4) as loader:
            workers = [Worker(loader._plan, index, count).parts() for index in range(count)]
            for _ in range(5):
                assert equal(_assemble([next(parts) for parts in workers], 9), next(loader))


def test_worker_processes_give_the_same_batches(three_shards: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPYARD_TEST_NUMBER", "17")  # set after the fork server may have started
    monkeypatch.chdir(Path(three_shards[0]).parent)
    config = config_of([Path(url).name for url in three_shards], sizes=SIZES)
    torch.manual_seed(3)
    random_state = torch.get_rng_state()
    with build(config) as here, build(dataclasses.replace(config, workers=2)) as there:
        for _ in range(12):
            assert equal(next(here), next(there))
        assert json.dumps(here.position().to_json()) == json.dumps(there.position().to_json())
        assert here.stats() == there.stats()
        assert torch.equal(torch.get_rng_state(), random_state)
        # What the fork server's children must survive, and what the server itself must.
        workers = list(there._processes)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            for pid in [server_pid(), *(process.pid or 0 for process in workers)]:
                os.kill(pid, number)
        for _ in range(12):
            assert equal(next(here), next(there))
    assert not [process for process in workers if process.is_alive()]
    assert not set(workers) & set(multiprocessing.active_children())
    with pytest.raises(DataError, match="closed"):
        next(there)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.sampled_from([1, 2, 4]),
    later_ranks=st.sampled_from([1, 2, 3, 4]),
    steps=st.integers(0, 12),
    resampled=st.booleans(),
)
def test_a_resumed_run_neither_repeats_nor_loses(
    three_shards: tuple[str, ...], ranks: int, later_ranks: int, steps: int, resampled: bool
) -> None:
    config = config_of(three_shards, sizes=SIZES, resampled=resampled, batch_size=12 // ranks)
    loaders = [build(config, rank, ranks) for rank in range(ranks)]
    before = [[next(loader) for loader in loaders] for _ in range(steps)]
    position = Position.merge([loader.position() for loader in loaders])
    position = Position.from_json(json.loads(json.dumps(position.to_json())))
    continued = [[next(loader) for loader in loaders] for _ in range(9)]
    later = dataclasses.replace(config, batch_size=12 // later_ranks)
    resumed = [build(later, rank, later_ranks, position) for rank in range(later_ranks)]
    after = [[next(loader) for loader in resumed] for _ in range(9)]
    if later_ranks == ranks:
        assert all(equal(a, b) for x, y in zip(continued, after, strict=True) for a, b in zip(x, y, strict=True))
    if 12 % later_ranks == 0 and later_ranks != 3:  # lanes that divide evenly keep every step's samples together
        for x, y in zip(continued, after, strict=True):
            assert Counter(numbers(x)) == Counter(numbers(y))
    if not resampled:
        whole = Counter(numbers([batch for step in [*before, *after] for batch in step]))
        assert max(whole.values()) - min(whole[number] for number in range(108)) <= 1


def test_a_resume_in_worker_processes_with_prefetch_in_flight(three_shards: tuple[str, ...]) -> None:
    config = config_of(three_shards, sizes=SIZES, workers=2)
    with build(config) as loader:
        take(loader, 5)
        position = loader.position()
        expected = take(loader, 3)
    with build(dataclasses.replace(config, workers=1), position=position) as resumed:
        assert all(equal(next(resumed), batch) for batch in expected)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 12), st.integers(0, 3), st.booleans())
def test_a_resume_with_another_number_of_workers_gives_the_same_batches(
    three_shards: tuple[str, ...], count: int, later_count: int, steps: int, rank: int, resampled: bool
) -> None:
    """The workers of one rank, called in turn as DataLoader does it."""
    config = config_of(three_shards, sizes=SIZES, resampled=resampled, batch_size=9)
    with build(config, rank, 4) as loader:
        plan = loader._plan
    workers = [Worker(plan, index, count).parts() for index in range(count)]
    cursors = dict(plan.cursors)
    for _ in range(steps):
        for part in [next(parts) for parts in workers]:
            cursors |= part.cursors
    later = dataclasses.replace(plan, cursors=cursors)
    resumed = [Worker(later, index, later_count).parts() for index in range(later_count)]
    for _ in range(4):
        assert equal(_assemble([next(parts) for parts in workers], 9), _assemble([next(parts) for parts in resumed], 9))


def test_the_order_depends_on_the_seed_alone(three_shards: tuple[str, ...]) -> None:
    config = config_of(three_shards, sizes=SIZES)
    same = dataclasses.replace(config, image_size=(4, 4), max_skip_fraction=0.5, aug=AugmentConfig())
    other = dataclasses.replace(config, seed=1)
    orders = [numbers(take(build(one), 9)) for one in (config, config, same, other)]
    assert orders[0] == orders[1] == orders[2]
    assert orders[0] != orders[3]
    assert Counter(orders[0]) == Counter(orders[3]) == dict.fromkeys(range(108), 1)


def test_an_epoch_is_counted_once_every_lane_is_beyond_it(three_shards: tuple[str, ...]) -> None:
    with build(config_of(three_shards, sizes=SIZES, batch_size=36)) as loader:
        take(loader, 3)
        assert loader.stats().epochs == 0
        next(loader)
        assert loader.stats().epochs == 1
        take(loader, 3)
        assert loader.stats().epochs == 2
        assert loader.stats().delivered == 7 * 36


def test_a_resume_goes_on_with_the_lanes_that_have_given_fewest(three_shards: tuple[str, ...]) -> None:
    config = config_of(three_shards, sizes=SIZES, batch_size=12)
    with build(config) as loader:
        next(loader)
        position = loader.position()
    uneven = dataclasses.replace(config, batch_size=7)
    with build(uneven, position=position) as loader:
        next(loader)
        position = loader.position()
        assert {cursor.taken for cursor in position.cursors.values()} == {1, 2}
        with build(uneven, position=position) as resumed:
            for _ in range(4):
                assert equal(next(loader), next(resumed))


def test_a_position_of_other_data_is_refused(three_shards: tuple[str, ...]) -> None:
    config = config_of(three_shards, sizes=SIZES)
    with pytest.raises(DataConfigError, match="seed: 0 in the checkpoint, 1 now"):
        build(dataclasses.replace(config, seed=1), position=build(config).position())


def test_too_many_ranks_for_the_lanes_are_refused(three_shards: tuple[str, ...]) -> None:
    config = config_of(three_shards, batch_size=2)
    with pytest.raises(DataConfigError, match="2 lanes cannot be dealt to 3 ranks"):
        build(config, 0, 3, build(config).position())


def test_broken_samples_are_counted_by_reason_and_replaced(shards: Shards) -> None:
    broken = {
        3: "truncated_image",
        8: "no_caption",
        13: "empty_caption",
        21: "empty_image",
        34: "no_image",
        35: "no_image",
    }
    paths = shards([40, 40], broken=broken)
    with build(config_of(paths, sizes=(40, 40), batch_size=1)) as loader:
        seen = Counter(numbers(take(loader, 74)))
        counts = loader.stats().counts()
    assert seen == {number: 1 for number in range(80) if number not in broken}
    assert counts["skipped_samples"] == 6
    assert counts["skipped_samples/no_image"] == 2
    for reason in ("undecodable_image", "no_caption", "empty_caption", "empty_image"):
        assert counts[f"skipped_samples/{reason}"] == 1
    assert counts["samples/set"] == 74


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_without_a_valid_sample_stops_within_seconds(shards: Shards, workers: int) -> None:
    paths = shards([200], broken=dict.fromkeys(range(200), "no_caption"))
    began = time.monotonic()
    with (
        build(config_of(paths, resampled=True, workers=workers, max_skip_fraction=1.0)) as loader,
        pytest.raises(
            DataError, match=r"100 of 100 samples cannot be used \(100 no_caption, e.g. 0\d+ in .*tar"
        ) as caught,
    ):
        next(loader)
    assert type(caught.value) is DataError
    assert time.monotonic() - began < 20


def test_too_large_a_share_of_broken_samples_stops_the_run(shards: Shards) -> None:
    paths = shards([100], broken=dict.fromkeys(range(30, 60), "not_an_image"))
    with build(config_of(paths, sizes=(100,))) as loader, pytest.raises(DataError, match="max-skip-fraction is 0"):
        take(loader, 20)
    with build(config_of(paths, sizes=(100,), max_skip_fraction=0.4)) as loader:
        take(loader, 20)


@pytest.mark.parametrize("workers", [0, 1])
def test_missing_shards_all_of_them_stop_the_run(tmp_path: Path, workers: int) -> None:
    config = config_of([tmp_path / f"{number}.tar" for number in range(3)], resampled=True, workers=workers)
    with build(config) as loader, pytest.raises(DataError, match=r"0?\.tar: No such file or directory \(missing\)"):
        next(loader)


def test_failed_shards_are_counted_and_too_many_stop_the_run(shards: Shards) -> None:
    paths = shards([20] * 4)
    cut_tar(paths[0])
    paths[1].unlink()
    config = config_of(paths, resampled=True, max_skip_fraction=0.9)
    with build(config) as loader:
        take(loader, 30)
        failed = loader.stats().failed_shards
    assert failed["truncated"] > 0
    assert failed["missing"] > 0
    with (
        build(dataclasses.replace(config, max_skip_fraction=0.1)) as loader,
        pytest.raises(DataError, match="shards cannot be read"),
    ):
        take(loader, 30)


@pytest.mark.slow  # DataLoader looks after its workers every five seconds
def test_a_killed_worker_is_named(three_shards: tuple[str, ...]) -> None:
    with build(config_of(three_shards, sizes=SIZES, workers=2)) as loader:
        next(loader)
        victim = loader._processes[1]
        os.kill(victim.pid or 0, signal.SIGKILL)
        with pytest.raises(DataError, match=rf"worker 1 \(pid {victim.pid}\) was killed by signal 9"):
            take(loader, 50)


def test_storage_that_fails_in_passing_changes_no_batch(
    three_shards: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Retry, "pause", lambda *_: None)
    with serve() as server:
        server.objects = {f"/{Path(url).name}": Path(url).read_bytes() for url in three_shards}
        remote = [f"{server.url}/{Path(url).name}" for url in three_shards]
        # Fewer than the attempts on one range: the lanes race for them, and all may meet the same one.
        server.faults = [(kind, number * 999) for number in range(3) for kind in ("reset", "short")]
        server.faults[3:3] = [("status", 503)]
        with build(config_of(remote, sizes=SIZES)) as faulty, build(config_of(three_shards, sizes=SIZES)) as local:
            for _ in range(12):
                there, here = next(faulty), next(local)
                assert torch.equal(there.images, here.images)
                assert there.keys == here.keys
            assert not faulty.stats().failed_shards
        assert not server.faults


def test_sources_are_drawn_by_their_factors(shards: Shards, tmp_path: Path) -> None:
    first = shards([50])
    second = write_shards(tmp_path / "second", [50])
    sources = (Source("plain", (str(first[0]),)), Source("triple", (str(second[0]),), 3.0))
    config = config_of([], sources=sources, resampled=True, sizes=(50, 50), batch_size=32)
    with build(config) as loader:
        take(loader, 100)
        counts = loader.stats().source_samples
    assert counts["triple"] / 3200 == pytest.approx(0.75, abs=0.1)


@pytest.mark.parametrize("workers", [0, 2])
def test_only_samples_that_the_filter_keeps_become_rows(three_shards: tuple[str, ...], workers: int) -> None:
    config = config_of(three_shards, sizes=SIZES, where="index >= 90 or index == 3", batch_size=9, workers=workers)
    with build(config) as loader:
        found = Counter(numbers(take(loader, 3)))
        counts = loader.stats().counts()
    assert set(found) <= {3, *range(90, 108)}
    assert counts["skipped_samples"] == 0
    assert counts["filtered/set"] == counts["filtered_samples"] > 0
    with pytest.raises(DataConfigError, match="--where: index >= 90 or index == 3 in the checkpoint, none now"):
        build(dataclasses.replace(config, where=None), position=loader.position())


def test_lists_and_synthetic_sets_are_read_the_same_way(shards: Shards, tmp_path: Path) -> None:
    with build(config_of([], sources=(), dataset_type="synthetic", num_samples=30, batch_size=6)) as loader:
        keys = [key for _ in range(5) for key in next(loader).keys]
    assert len(set(keys)) == 30
    from tests.helpers.shards import draw_image

    rows = ["filepath\ttitle"]
    for number in range(6):
        draw_image(number).save(tmp_path / f"{number}.png")
        rows.append(f"{tmp_path}/{number}.png\tnumber {number}")
    (tmp_path / "list.tsv").write_text("\n".join(rows) + "\n")
    config = config_of([tmp_path / "list.tsv"], dataset_type="csv", batch_size=3)
    with build(config) as loader:
        assert sorted(numbers([next(loader), next(loader)])) == list(range(6))
    assert run_preflight(config, Numbers()).valid == 6


def test_nothing_to_read_is_refused(three_shards: tuple[str, ...]) -> None:
    for changes, reason in (
        ({"sources": ()}, "no shards"),
        ({"sizes": (0, 0, 0)}, "empty"),
        ({"sizes": (1,)}, "1 shard sizes"),
    ):
        with pytest.raises(DataConfigError, match=reason):
            build(config_of(three_shards, **changes))


def test_of_several_captions_one_is_drawn_and_again_after_a_resume(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        for index in range(40):
            fields = make_sample(index, caption=f"short {index}", image_size=16)
            writer.write({"__key__": str(index), **fields, "long": f"long {1000 + index}".encode()})
    config = config_of(
        [tmp_path / "a.tar"], batch_size=10, sizes=(40,), captions=CaptionConfig(("txt", "long"), (1.0, 3.0))
    )
    with build(config) as loader:
        first = take(loader, 2)
        position = loader.position()
        second = take(loader, 2)
    with build(config, position=position) as loader:
        assert all(equal(a, b) for a, b in zip(take(loader, 2), second, strict=True))
    keys = [int(key) for batch in (*first, *second) for key in batch.keys]
    drawn = numbers([*first, *second])
    assert [number % 1000 for number in drawn] == keys and sorted(keys) == list(range(40))
    assert 20 < sum(number >= 1000 for number in drawn) < 40
