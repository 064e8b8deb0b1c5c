"""Greedy choices, which scores win, and recipes that cannot be followed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from training.config import DataConfig, EvalConfig
from training.errors import ConfigError
from training.evaluation.exam import Exam
from training.soup_recipe import SoupRecipe, check_recipe, choose_greedily, gain


def test_the_best_is_tried_first_and_each_is_kept_that_does_no_harm() -> None:
    soups = {(2, 0): 0.7, (2, 0, 3): 0.65, (2, 0, 1): 0.7}
    asked: list[tuple[int, ...]] = []

    def together(indices: list[int]) -> float:
        asked.append(tuple(indices))
        return soups[tuple(indices)]

    assert choose_greedily([0.6, 0.4, 0.7, 0.5], together) == [(2, True), (0, True), (3, False), (1, True)]
    assert asked == list(soups)  # a candidate that was left out is in no later soup


def test_of_equal_candidates_the_one_named_first_is_first() -> None:
    assert [index for index, _ in choose_greedily([0.5, 0.5, 0.5], lambda _: 0.0)] == [0, 1, 2]


def test_a_soup_of_no_number_is_not_kept_and_such_a_candidate_comes_last() -> None:
    worst = gain("val/x-top1", math.nan)
    assert choose_greedily([worst, 0.2, 0.1], lambda indices: worst) == [(1, True), (2, False), (0, False)]


@pytest.mark.parametrize(
    ("metric", "better", "worse"),
    [
        ("val/imagenet-zeroshot-val-top1", 0.7, 0.6),
        ("val/image_to_text_R@1", 0.7, 0.6),
        ("val/clip_val_loss", 1.0, 2.0),
        ("val/text_to_image_mean_rank", 1.5, 9.0),
    ],
)
def test_losses_and_ranks_win_when_smaller(metric: str, better: float, worse: float) -> None:
    assert gain(metric, better) > gain(metric, worse) > gain(metric, math.nan)


def test_the_first_metric_is_the_first_sets_top1() -> None:
    sets = EvalConfig(imagenet_val="i", zeroshot_data=("a=b", "c/d"))
    assert Exam(sets=sets).metrics[::3] == [
        f"val/{stem}-top1" for stem in ("imagenet-zeroshot-val", "a-zeroshot", "d-zeroshot")
    ]
    assert Exam(data=DataConfig(val_data="v")).metrics[0] == "val/image_to_text_R@1"
    assert Exam().metrics == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": (1.0, 1.0), "greedy": True}, "exclude each other"),
        ({"weights": (1.0,)}, "--weights: 1 for 2 checkpoints"),
        ({"weights": (1.0, 0.0)}, "above 0"),
        ({"weights": (1.0, math.nan)}, "above 0"),
        ({"alphas": (0.5,)}, "--alpha needs --base"),
        ({"base": "b", "alphas": (1.5,)}, "between 0"),
        ({"base": "b", "alphas": (math.nan,)}, "between 0"),
        ({"metric": "val/b-zeroshot-top1"}, "the sets given have val/a-zeroshot-top1, "),
    ],
)
def test_what_cannot_be_done_is_said(settings: dict[str, Any], message: str) -> None:
    metrics = Exam(sets=EvalConfig(zeroshot_data=("a=b",))).metrics
    with pytest.raises(ConfigError) as caught:
        check_recipe(SoupRecipe(candidates=("x", "y"), **settings), metrics)
    assert message in str(caught.value)


@pytest.mark.parametrize("settings", [{"greedy": True}, {"metric": "m"}, {"base": "b", "alphas": (0.1, 0.2)}])
def test_a_choice_needs_sets(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="need sets to score on"):
        check_recipe(SoupRecipe(candidates=("x",), **settings), [])
