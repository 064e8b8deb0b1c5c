"""Small models, built once a session where a test only reads them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from models import CLIP, ModelConfig, build_model, load_model_config

FAMILIES = ("tiny-test", "tiny-test-rn", "tiny-test-timm")


@pytest.fixture
def build() -> Callable[[str | ModelConfig], CLIP]:
    """`build(name_or_config)`: a freshly initialised model, the same at every call."""

    def built(model: str | ModelConfig) -> CLIP:
        torch.manual_seed(0)
        return build_model(load_model_config(model) if isinstance(model, str) else model)

    return built
