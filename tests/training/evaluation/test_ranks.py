"""The same figures, to the last bit, on any number of ranks; errors and stops reach all of them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import models
from tests.helpers.gloo import run_ranks
from tests.helpers.shards import write_shards
from tests.training.evaluation.conftest import write_labelled
from training.config import ClusterConfig, DataConfig, EvalConfig
from training.distributed import World, session
from training.errors import PeerError
from training.evaluation import Evaluator


def evaluate(labelled: str, pairs: str, world: World, stop_rank: int = -1) -> dict[str, float] | None:
    torch.manual_seed(0)
    model = models.create_model("tiny-test")
    evaluator = Evaluator(
        EvalConfig(zeroshot_data=(f"shapes={labelled}",)),
        DataConfig(val_data=pairs),
        models.get_tokenizer("tiny-test"),
        models.InferenceTransform(model.config.preprocess),
        world,
        batch_size=3,
        workers=1,
        should_stop=lambda: world.rank == stop_rank,
        precision="fp32",
    )
    return evaluator.evaluate_sets(model, evaluator.labels())


def on_rank(labelled: str, pairs: str, stop_rank: int = -1) -> dict[str, float] | str | None:
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    with session(ClusterConfig(device="cpu")) as world:
        try:
            return evaluate(labelled, pairs, world, stop_rank)
        except PeerError:
            return "told by a peer"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """11 labelled images and 10 pairs, some with two captions: nothing that 2 or 4 ranks divide."""
    folder = tmp_path_factory.mktemp("sets")
    write_shards(folder / "pairs", [7, 3], captions=lambda i: f"number {i}\nno {i}" if i % 3 else f"the {i}")
    return str(write_labelled(folder / "labelled")), str(folder / "pairs" / "shard-{00000..00001}.tar")


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_ranks_give_the_figures_of_one(sets: tuple[str, str], num_ranks: int) -> None:
    torch.set_num_threads(1)
    alone = evaluate(*sets, World())
    assert alone is not None
    for figures in run_ranks(on_rank, num_ranks, *sets):
        assert figures == alone


def test_a_stop_asked_of_one_rank_stops_all(sets: tuple[str, str]) -> None:
    assert run_ranks(on_rank, 2, *sets, 1) == [None, None]


def test_a_broken_image_on_one_rank_leaves_the_set_out_on_all(sets: tuple[str, str], tmp_path: Path) -> None:
    broken = write_labelled(tmp_path / "broken", broken=10)
    first, second = run_ranks(on_rank, 2, str(broken), sets[1])
    assert first == second
    assert isinstance(first, dict)
    assert not any("zeroshot" in name for name in first)
