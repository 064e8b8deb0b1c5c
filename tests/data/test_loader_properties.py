"""What holds for the loader whatever the shards, ranks, workers and the moment of a stop."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batch import Batch, Position
from data.config import LoaderConfig
from data.handoff import Receiver
from data.loader import TrainLoader, _assemble, build_train_loader
from data.urls import Source
from data.worker import Worker

GLOBAL_BATCH = 12
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=6)
RANKS = st.sampled_from([1, 2, 3, 4, 6, 12])
WORKERS = st.integers(1, 5)
MIXED = st.booleans()


def no_tokens(captions: list[str]) -> torch.Tensor:
    return torch.zeros(len(captions), 1, dtype=torch.int64)


def config_of(sizes: Sequence[int], mixed: bool = False, resampled: bool = False) -> LoaderConfig:
    """Generated shards of these sizes; in a mixture each is a source, with proportions 1, 2, 3 and so on."""
    ends = list(itertools.accumulate(sizes))
    urls = [f"synthetic:{end - size}-{end}" for end, size in zip(ends, sizes, strict=True)]
    sources = [Source(f"s{n}", (url,), proportion=n + 1.0) for n, url in enumerate(urls)]
    return LoaderConfig(
        sources=tuple(sources) if mixed else (Source("all", tuple(urls)),),
        sizes=tuple(sizes),
        dataset_type="synthetic",
        batch_size=GLOBAL_BATCH,
        image_size=(4, 4),
        resampled=resampled,
        shuffle_budget_mib=1,
    )


class Run:
    """All ranks of a run in this process, each rank's workers called in turn as its loader does it."""

    def __init__(self, config: LoaderConfig, ranks: int, workers: int, position: Position | None = None):
        config = dataclasses.replace(config, batch_size=GLOBAL_BATCH // ranks)
        self.loaders = [build_train_loader(config, no_tokens, rank, ranks, position) for rank in range(ranks)]
        for loader in self.loaders:
            loader._parts = self._in_turn(loader, workers)
            loader._receivers = [Receiver() for _ in range(workers)]

    @staticmethod
    def _in_turn(loader: TrainLoader, count: int) -> Iterator[object]:
        workers = [Worker(loader._plan, index, count).parts() for index in range(count)]
        while True:
            for parts in workers:
                yield next(parts)

    def step(self) -> Counter[str]:
        """The samples of all ranks' next batches."""
        return Counter(key for batch in self.batches() for key in batch.keys)

    def batches(self) -> list[Batch]:
        return [next(loader) for loader in self.loaders]

    def position(self) -> Position:
        """The run's position as its checkpoint would give it back."""
        merged = Position.merge([loader.position() for loader in self.loaders])
        return Position.from_json(json.loads(json.dumps(merged.to_json())))


@settings(max_examples=25, deadline=None)
@given(SIZES, RANKS, WORKERS, RANKS, WORKERS, st.integers(0, 15), MIXED, st.booleans())
def test_any_stop_and_any_other_ranks_and_workers_leave_no_trace(
    sizes: list[int], ranks: int, workers: int, later: int, later_workers: int, cut: int, mixed: bool, resampled: bool
) -> None:
    """Every step of an interrupted run holds the samples of the uninterrupted one's: none repeated, none lost.

    The run has a lane for each row of the global batch, so its lanes divide evenly over any of these ranks.
    """
    config = config_of(sizes, mixed, resampled)
    first = Run(config, ranks, workers)
    whole = Run(config, ranks, 1)
    for _ in range(cut):
        assert first.step() == whole.step()
    again = Run(config, later, later_workers, first.position())
    for _ in range(6):
        assert again.step() == whole.step()


@settings(max_examples=15, deadline=None)
@given(SIZES, RANKS, WORKERS, st.integers(1, 20), MIXED)
def test_without_replacement_epochs_hold_every_sample_once(
    sizes: list[int], ranks: int, workers: int, steps: int, mixed: bool
) -> None:
    run = Run(config_of(sizes, mixed), ranks, workers)
    found = sum((run.step() for _ in range(steps)), Counter())
    position = run.position()
    for stream in range(position.streams):
        epochs = [cursor.epoch for number, cursor in position.cursors.items() if number % position.streams == stream]
        first, count = (sum(sizes[:stream]), sizes[stream]) if mixed else (0, sum(sizes))
        times = [found[f"{number:09d}"] for number in range(first, first + count)]
        # Every lane is beyond epoch min(epochs), and none beyond max(epochs).
        assert min(epochs) <= min(times)
        assert max(times) <= max(epochs) + 1


def test_three_shards_of_one_seven_and_a_hundred_on_four_ranks_of_three_workers() -> None:
    run = Run(config_of((1, 7, 100)), ranks=4, workers=3)
    assert sum((run.step() for _ in range(9)), Counter()) == {f"{number:09d}": 1 for number in range(108)}


def test_ranks_and_workers_give_the_same_rows_bit_for_bit() -> None:
    """With one lane a row: rank r of two holds the rows that one rank alone has for the same lanes."""
    alone, two = Run(config_of((60, 300)), 1, 1), Run(config_of((60, 300)), 2, 3)
    for _ in range(4):
        (whole,) = alone.batches()
        halves = two.batches()
        rows = {key: image for batch in halves for key, image in zip(batch.keys, batch.images, strict=True)}
        assert all(torch.equal(rows[key], image) for key, image in zip(whole.keys, whole.images, strict=True))


def test_the_helper_assembles_as_the_loader_does() -> None:
    config = config_of((60, 300))
    with build_train_loader(config, no_tokens, 0, 1) as loader:
        parts = [next(Worker(loader._plan, index, 2).parts()) for index in range(2)]
        assert _assemble(parts, GLOBAL_BATCH).keys == next(loader).keys == Run(config, 1, 2).batches()[0].keys
