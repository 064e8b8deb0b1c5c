"""The linear probe: the minimum that it claims, the same on any number of ranks, its errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data import EvalBatch
from tests.helpers.gloo import run_ranks
from tests.training.evaluation.test_zeroshot import FirstPixels
from training.config import ClusterConfig
from training.distributed import World, session
from training.errors import DataConfigError
from training.evaluation import Stopped
from training.evaluation.linear_probe import (
    STRENGTHS,
    Fit,
    LabelledFeatures,
    choose_strength,
    held_out_rows,
    linear_probe,
)

NUM_CLASSES, WIDTH = 4, 12


def drawn(count: int, seed: int, noise: float = 0.6) -> LabelledFeatures:
    """Features that a noisy linear rule labels; the rule is the same for every seed."""
    rule = torch.randn(WIDTH, NUM_CLASSES, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(count, WIDTH, generator=generator, dtype=torch.float64), dim=1)
    scores = features @ rule + noise * torch.randn(count, NUM_CLASSES, generator=generator, dtype=torch.float64)
    return LabelledFeatures(features, scores.argmax(dim=1))


def batches(split: LabelledFeatures, rank: int = 0, size: int = 1, batch_size: int = 5) -> Iterator[EvalBatch]:
    """Pictures whose feature under `FirstPixels` is the row."""
    mine = torch.arange(rank, len(split.labels), size)
    images = split.features.float()[:, None, None, :].expand(-1, 3, 2, -1)
    for rows in mine.split(batch_size):
        yield EvalBatch(images[rows], rows, split.labels[rows])


def fitted(train: LabelledFeatures, strength: float) -> Fit:
    fit = Fit(train, NUM_CLASSES, strength)
    while not fit.done:
        fit.advance()
    return fit


def objective(train: LabelledFeatures, classifier: Tensor, strength: float) -> Tensor:
    logits = train.features @ classifier[:-1] + classifier[-1]
    return F.cross_entropy(logits, train.labels) + strength / 2 * classifier[:-1].square().sum()


@pytest.mark.parametrize("strength", [1e-1, 1e-3, 1e-5])
def test_a_fit_ends_where_autograd_finds_no_slope(strength: float) -> None:
    train = drawn(120, seed=1)
    classifier = fitted(train, strength).classifier().clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective(train, classifier, strength), classifier)
    assert slope.abs().max() < 1e-6


@pytest.mark.parity
@pytest.mark.parametrize("strength", [1e-1, 1e-3, 1e-5])
def test_a_fit_is_the_logistic_regression_of_scikit_learn(strength: float) -> None:
    """What Radford et al. 2021 probe with; its C weighs the sum of the losses against the squared weights."""
    linear_model = pytest.importorskip("sklearn.linear_model", reason="compares with scikit-learn")
    train, test = drawn(120, seed=1), drawn(200, seed=2)
    theirs = linear_model.LogisticRegression(C=1 / (strength * 120), tol=1e-10, max_iter=10_000)
    theirs.fit(train.features.numpy(), train.labels.numpy())
    classifier = fitted(train, strength).classifier()
    ours = (test.features @ classifier[:-1] + classifier[-1]).softmax(dim=1)
    expected = torch.from_numpy(theirs.predict_proba(test.features.numpy()))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_a_fit_in_blocks_is_that_of_all_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    train = drawn(50, seed=1)
    whole = fitted(train, 1e-3).classifier()
    monkeypatch.setattr("training.evaluation.linear_probe._SCORES_A_BLOCK", 7 * NUM_CLASSES)
    assert torch.allclose(fitted(train, 1e-3).classifier(), whole, atol=1e-5)


def test_every_fifth_image_of_a_class_is_held_out() -> None:
    labels = torch.tensor([0] * 5 + [1] * 4 + [2, 0, 2, 0, 2, 0, 2, 0, 2, 0])
    assert held_out_rows(labels).nonzero()[:, 0].tolist() == [4, 17, 18]


def test_noisy_labels_want_more_regularisation_than_clean_ones() -> None:
    clean = choose_strength(drawn(300, seed=1, noise=0.0), NUM_CLASSES, World())
    noisy = choose_strength(drawn(300, seed=1, noise=3.0), NUM_CLASSES, World())
    assert clean < noisy
    assert {clean, noisy} <= set(STRENGTHS)


def test_classes_too_small_to_spare_an_image_take_the_middle_strength() -> None:
    few = LabelledFeatures(torch.eye(4, dtype=torch.float64), torch.tensor([0, 0, 1, 1]))
    assert choose_strength(few, 2, World()) == STRENGTHS[len(STRENGTHS) // 2]


def probe(world: World | None = None, stop_rank: int = -1) -> dict[str, float]:
    world = world or World()
    train, test = (
        batches(drawn(count, seed, noise=0.1), world.rank, world.size) for count, seed in ((101, 1), (53, 2))
    )
    return linear_probe(
        FirstPixels(), train, test, NUM_CLASSES, 5, (2, WIDTH), world=world, should_stop=lambda: world.rank == stop_rank
    )


def on_rank(stop_rank: int = -1) -> dict[str, float] | str:
    torch.set_num_threads(1)
    with session(ClusterConfig(device="cpu")) as world:
        try:
            return probe(world, stop_rank)
        except Stopped:
            return "stopped"


def test_the_probe_is_far_better_than_chance_and_counts_the_test_split() -> None:
    found = probe()
    assert found["num_samples"] == 53
    assert found["top1"] > 3 / NUM_CLASSES


def test_several_ranks_give_the_figures_of_one() -> None:
    torch.set_num_threads(1)
    alone = probe()
    assert run_ranks(on_rank, 2) == [alone, alone]


@pytest.mark.slow
def test_four_ranks_give_the_figures_of_one() -> None:
    torch.set_num_threads(1)
    assert run_ranks(on_rank, 4) == [probe()] * 4


def test_a_stop_asked_of_one_rank_stops_all() -> None:
    assert run_ranks(on_rank, 2, 1) == ["stopped", "stopped"]


def test_a_stop_is_heard_between_the_iterations_of_a_fit() -> None:
    answers = iter([False] * 3 + [True])
    with pytest.raises(Stopped):
        choose_strength(drawn(100, seed=1), NUM_CLASSES, World(), lambda: next(answers))


def test_an_empty_split_is_named() -> None:
    split = drawn(20, seed=1)
    with pytest.raises(DataConfigError, match="the test split is empty"):
        linear_probe(FirstPixels(), batches(split), iter(()), NUM_CLASSES, 5, (2, WIDTH))


def test_a_label_beyond_the_classes_is_named() -> None:
    split = drawn(20, seed=1)
    split.labels[3] = 9
    with pytest.raises(DataConfigError, match="sample 3 of the set has label 9, but there are 4 class names"):
        linear_probe(FirstPixels(), batches(split), batches(split), NUM_CLASSES, 5, (2, WIDTH))
