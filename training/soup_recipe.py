"""What is asked of a soup: its recipe, and which scores win. Knows no files and no tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from training.errors import ConfigError

# Figures that are better when they are smaller end so.
_LOWER_IS_BETTER = ("loss", "_rank")


@dataclass(frozen=True, kw_only=True)
class SoupRecipe:
    """What to average. alphas: how far to go from `base` (0) to the average of the candidates (1).

    weights: how much each candidate counts, all alike if there are none. metric: by which figure candidates and
    alphas are chosen, the first of `Exam.metrics` if None. model: of candidates that are bare weights.
    """

    candidates: tuple[str, ...]
    weights: tuple[float, ...] = ()
    greedy: bool = False
    base: str | None = None
    alphas: tuple[float, ...] = (1.0,)
    metric: str | None = None
    model: str | None = None


def check_recipe(recipe: SoupRecipe, metrics: list[str]) -> None:
    """Raises ConfigError for what cannot be done, or not with sets that have these figures."""
    if recipe.weights and recipe.greedy:
        raise ConfigError("--weights and --greedy exclude each other: a greedy soup is a plain mean of what it keeps")
    if recipe.weights and len(recipe.weights) != len(recipe.candidates):
        raise ConfigError(f"--weights: {len(recipe.weights)} for {len(recipe.candidates)} checkpoints, each needs one")
    if not all(math.isfinite(weight) and weight > 0 for weight in recipe.weights):
        raise ConfigError("--weights are numbers above 0; leave a checkpoint out that is not to count")
    if not all(0 <= alpha <= 1 for alpha in recipe.alphas):
        raise ConfigError("--alpha is between 0 (the base) and 1 (the average of the checkpoints)")
    if recipe.base is None and recipe.alphas != (1.0,):
        raise ConfigError("--alpha needs --base: the model at 0")
    if not metrics and (recipe.greedy or recipe.metric or len(recipe.alphas) > 1):
        raise ConfigError(
            "--greedy, --metric and several --alpha need sets to score on: --zeroshot-data, --eval-suite, --val-data"
        )
    if recipe.metric and recipe.metric not in metrics:
        raise ConfigError(f"--metric {recipe.metric}: the sets given have {', '.join(metrics)}")


def gain(metric: str, value: float) -> float:
    """The value of a figure as something that is better when larger; what is no number is worst."""
    if math.isnan(value):
        return -math.inf
    return -value if metric.endswith(_LOWER_IS_BETTER) else value


def choose_greedily(alone: Sequence[float], together: Callable[[list[int]], float]) -> list[tuple[int, bool]]:
    """(candidate, kept), in the order in which they were tried (Model soups, recipe 1).

    alone: the gain of each candidate by itself; the best is tried first, of equal ones the one named first.
    together: the gain of candidates averaged. One is kept if the soup with it is no worse than without it.
    """
    first, *others = sorted(range(len(alone)), key=lambda index: -alone[index])
    kept, reached, tried = [first], alone[first], [(first, True)]
    for index in others:
        found = together([*kept, index])
        tried.append((index, found >= reached))
        if found >= reached:
            kept, reached = [*kept, index], found
    return tried
