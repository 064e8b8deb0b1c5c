"""The loss benchmark measures both sides alike, and says so in Markdown."""

from __future__ import annotations

import pytest

from scripts.benchmark_loss import report, run

pytest.importorskip("open_clip", reason="compares with open_clip_torch")


def test_a_report_has_both_sides_and_their_ratio() -> None:
    measured = {"mib": 10.0, "cpu_s": 1.0, "wall_s": 2.0, "loss": 3.0}
    text = report({"ours": [measured] * 3, "openclip": [{**measured, "mib": 80.0}] * 3}, 4, 2, 8)
    assert "G = 8 columns" in text and "3 rounds" in text
    assert "| peak extra memory, MiB | 10 (10 to 10) | 80 (80 to 80) | 0.125 | 0.125 to 0.125 |" in text


@pytest.mark.slow
def test_both_sides_see_the_same_logits() -> None:
    found = run(rounds=1, rows=64, world=4, embed=16)
    assert {side: len(each) for side, each in found.items()} == {"ours": 1, "openclip": 1}
