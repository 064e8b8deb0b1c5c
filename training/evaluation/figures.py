"""A measured figure and how sure it is. Knows no model and no set."""

from __future__ import annotations

import math
from dataclasses import dataclass

_Z = 1.959963984540054  # standard normal, two-sided 95 %


@dataclass(frozen=True)
class Figure:
    """`name` as in `metrics.jsonl`. low, high: a 95 % confidence interval over the draw of the set's samples."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


def share(name: str, value: float, num_trials: float) -> Figure:
    """A share of `num_trials` independent trials, in [0, 1], with Wilson's interval (Wilson 1927).

    Several captions of one image are not independent: for those `num_trials` is the number of images.
    """
    shrink = 1 + _Z**2 / num_trials
    centre = (value + _Z**2 / (2 * num_trials)) / shrink
    reach = _Z / shrink * math.sqrt(value * (1 - value) / num_trials + _Z**2 / (4 * num_trials**2))
    return Figure(name, value, max(0.0, min(value, centre - reach)), min(1.0, max(value, centre + reach)))


def mean_of(name: str, value: float, standard_error: float) -> Figure:
    """A mean in [0, 1] with the interval of the normal distribution, cut at 0 and 1."""
    reach = _Z * standard_error
    return Figure(name, value, max(0.0, value - reach), min(1.0, value + reach))


def values_of(figures: list[Figure]) -> dict[str, float]:
    """Values by name."""
    return {figure.name: figure.value for figure in figures}
