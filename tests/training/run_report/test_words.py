"""Numbers in words."""

from __future__ import annotations

import math

import pytest

from training.run_report import words


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (0.042, "0.042 s"), (42.4, "42 s"), (80, "1 min 20 s"), (7500, "2 h 5 min"), (273600, "3 d 4 h")],
)
def test_durations_have_two_units(seconds: float, said: str) -> None:
    assert words.duration(seconds) == said


def test_metrics_are_shown_by_their_kind() -> None:
    space = words.THIN_SPACE
    assert words.figure("val/demo-zeroshot-top1", 0.6386) == f"63.9{space}%"
    assert words.figure("val/image_to_text_R@10", 1.0) == f"100.0{space}%"
    assert words.figure("val/image_to_text_mean_rank", 1234.5) == f"1{space}234.5"
    assert words.figure("val/clip_val_loss", 0.373012) == "0.373"
    assert words.figure("val/clip_val_loss", math.nan) == words.NOTHING


def test_large_numbers_are_rounded_and_small_ones_are_not() -> None:
    assert words.large(12_845_056) == "12.8 million"
    assert words.large(34_000_000_000) == "34 billion"
    assert words.large(47_104) == f"47{words.THIN_SPACE}104"
