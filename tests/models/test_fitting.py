"""Weights that do not fit are told where they belong, out of all registered models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models import CLIP, ModelConfig, build_model, list_models, load_model_config
from models.fitting import _may_fit, models_that_fit

Build = Callable[[str | ModelConfig], CLIP]


def _state_of(name: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(build_model(load_model_config(name)).state_dict())


def _fitting(raw: dict[str, Tensor], quick_gelu: bool | None = None) -> list[str]:
    return models_that_fit(raw, lambda model, state: state, quick_gelu)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14", "RN50", "convnext_large_d", "tiny-test", "tiny-test-rn"])
def test_a_models_own_weights_fit_it_and_nothing_of_another_shape(name: str) -> None:
    fitting = _fitting(_state_of(name))
    assert name in fitting
    shapes = {key: value.shape for key, value in _state_of(name).items() if "positional_embedding" not in key}
    for other in fitting:
        assert {k: v.shape for k, v in _state_of(other).items() if "positional_embedding" not in k} == shapes


def test_the_known_activation_tells_models_of_equal_shape_apart() -> None:
    raw = _state_of("tiny-test")
    assert "tiny-test" in _fitting(raw, quick_gelu=False)
    assert "tiny-test" not in _fitting(raw, quick_gelu=True)


def test_what_a_few_keys_rule_out_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr("models.factory.build_model", lambda config: built.append(config.name) or build_model(config))
    _fitting(_state_of("ViT-B-32"))
    # ViT-B-32 and its variants have the same tensors and are built once.
    assert len(built) == 1
    _fitting({"weight": torch.zeros(1)})
    assert len(built) == 1


def test_weights_of_no_registered_model_fit_none(build: Build) -> None:
    raw = load_model_config("tiny-test").to_dict()
    raw["vision_cfg"]["layers"] = 3
    assert _fitting(dict(build(ModelConfig.from_dict(raw)).state_dict())) == []
    assert _fitting({"weight": torch.zeros(1)}) == []


@pytest.mark.parity
@pytest.mark.slow
def test_no_registered_model_is_ruled_out_by_the_few_keys_of_its_own_weights() -> None:
    checked = 0
    for name in list_models():
        config = load_model_config(name)
        if config.text_cfg.hf_model_name:
            continue  # needs another library, whose configurations are not here
        assert _may_fit(config, _state_of(name)), name
        checked += 1
    assert checked > 15
