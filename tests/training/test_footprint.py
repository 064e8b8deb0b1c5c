"""Memory and traffic by watching operators."""

from __future__ import annotations

import torch

from training.footprint import Footprint, bytes_of


def test_the_peak_is_what_lives_at_once_and_views_cost_nothing() -> None:
    before = torch.ones(1000)
    with Footprint() as footprint:
        first = before * 2
        first.view(10, 100).add_(1)
        del first
        second = before * 3
        both = second + before
    assert bytes_of([second, both]) == footprint.peak_bytes == 8000


def test_what_a_backward_pass_keeps_is_counted() -> None:
    weight = torch.ones(256, 256, requires_grad=True)
    with Footprint() as footprint:
        x = torch.ones(64, 256)
        for _ in range(4):
            x = torch.tanh(x @ weight)
        x.sum().backward()
    kept = 4 * bytes_of([x])
    assert kept + bytes_of([weight]) <= footprint.peak_bytes <= 3 * (kept + bytes_of([weight]))
