"""Intervals, against values that are known."""

from __future__ import annotations

import pytest

from training.evaluation.figures import Figure, mean_of, share, values_of


@pytest.mark.parametrize(
    ("value", "num_trials", "low", "high"),
    [  # Wilson's interval as other programs give it
        (0.5, 10, 0.236593, 0.763407),
        (0.0, 20, 0.0, 0.161125),
        (1.0, 20, 0.838875, 1.0),
        (0.78, 50_000, 0.776347, 0.783610),
    ],
)
def test_a_share_has_wilsons_interval(value: float, num_trials: int, low: float, high: float) -> None:
    figure = share("x", value, num_trials)
    assert (figure.low, figure.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


def test_a_means_interval_stays_within_0_and_1() -> None:
    assert mean_of("x", 0.9, 0.1) == Figure("x", 0.9, pytest.approx(0.9 - 0.195996, abs=1e-6), 1.0)


def test_values_go_by_their_names() -> None:
    assert values_of([Figure("a", 1.0), share("b", 0.5, 2)]) == {"a": 1.0, "b": 0.5}
