"""The benchmark of the step compares like with like."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import models
from scripts.benchmark_step import CAPTION_LENGTHS, draw_batch, main, useful_flops


def test_useful_operations_are_three_forward_passes_without_the_padding_of_texts() -> None:
    """Of the published model, 8.82 GFLOP for an image and 5.96 for the 77 tokens of a text."""
    mean = sum(CAPTION_LENGTHS) / 2
    expected = 3 * (8.82e9 + 5.96e9 * mean / 77)
    assert useful_flops(models.load_model_config("ViT-B-32")) == pytest.approx(expected, rel=0.03)


def test_captions_end_with_the_end_token_and_are_padded_with_zeros() -> None:
    tokens = draw_batch(models.load_model_config("tiny-test"), 8).tokens
    ends = tokens.argmax(dim=1)
    assert (tokens[torch.arange(8), ends] == 49407).all()
    assert all((row[end + 1 :] == 0).all() for row, end in zip(tokens, ends, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_both_sides_begin_with_the_same_loss(tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="compares with open_clip_torch")
    flags = ["--batch-size", "2", "--rounds", "1", "--warm-up", "0", "--out", str(tmp_path / "step.md")]
    assert main(flags) == 0
    text = (tmp_path / "step.md").read_text()
    ours, theirs = map(float, re.findall(r"(?:clipyard|open_clip) (\d+\.\d+)[,.]", text)[-2:])
    assert ours == pytest.approx(theirs, rel=1e-4)
