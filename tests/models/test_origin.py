"""Weights of the right shapes are refused where what lies beside them says that they mean something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models import CLIP, CheckpointError, ModelConfig, load_model_config, load_pretrained
from models.origin import Origin, find_origin

Build = Callable[[str | ModelConfig], CLIP]


def _raw(**changes: Any) -> dict[str, Any]:
    raw = load_model_config("tiny-test").to_dict()
    for section in ("vision_cfg", "text_cfg"):
        raw[section] = {**raw[section], **changes.pop(section, {})}
    return {**raw, **changes}


def _folder(folder: Path, model: CLIP, name: str, settings: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / name).write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_cfg": {"head_width": 16}}, "trained with vision_cfg.head_width 16, the model has 32"),
        ({"vision_cfg": {"pool_type": "avg"}}, "trained with vision_cfg.pool_type avg, the model has tok"),
        ({"text_cfg": {"heads": 4}}, "trained with text_cfg.heads 4, the model has 2"),
        ({"text_cfg": {"norm_kwargs": {"eps": 1e-6}}}, r"trained with text_cfg.norm_kwargs NormConfig\(eps=1e-06\)"),
        (
            {"quick_gelu": True},
            "with QuickGELU and tiny-test has none: give --force-quick-gelu, or tiny-test-quickgelu",
        ),
    ],
)
@pytest.mark.parametrize("name", ["model_config.json", "open_clip_config.json"])
def test_a_setting_that_no_shape_shows_is_compared_with_the_folders_configuration(
    build: Build, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    raw = _raw(**changes)
    settings = raw if name == "model_config.json" else {"model_cfg": raw, "preprocess_cfg": {}}
    source = _folder(tmp_path, build(ModelConfig.from_dict(raw)), name, settings)
    with pytest.raises(
        CheckpointError, match=rf"does not fit model tiny-test: they were {message}.*\({name}\)|{message}"
    ):
        load_pretrained(build("tiny-test"), source)
    same = build(ModelConfig.from_dict(raw))
    assert load_pretrained(same, source).resized == ()


def test_what_a_later_run_may_change_is_no_contradiction(build: Build, tmp_path: Path) -> None:
    raw = _raw(vision_cfg={"patch_dropout": 0.5, "norm_kwargs": {"eps": 1e-5}}, init_logit_scale=2.0)
    raw["preprocess_cfg"] = {"mean": [0.5, 0.5, 0.5]}
    source = _folder(tmp_path, build("tiny-test"), "model_config.json", raw)
    assert load_pretrained(build("tiny-test"), source).resized == ()


def test_a_file_inside_such_a_folder_has_the_same_origin(build: Build, tmp_path: Path) -> None:
    _folder(tmp_path, build("tiny-test"), "model_config.json", _raw(quick_gelu=True))
    with pytest.raises(CheckpointError, match="QuickGELU"):
        load_pretrained(build("tiny-test"), str(tmp_path / "model.safetensors"))


def test_a_folder_at_a_url_has_an_origin_too(build: Build, tmp_path: Path) -> None:
    import fsspec

    source = _folder(tmp_path / "run", build("tiny-test"), "model_config.json", _raw(quick_gelu=True))
    fsspec.filesystem("memory").put(source, "/origin/run", recursive=True)
    with pytest.raises(CheckpointError, match=r"memory://origin/run does not fit .*QuickGELU"):
        load_pretrained(build("tiny-test"), "memory://origin/run")


def test_the_numbers_beside_openais_weights_show_quick_gelu(build: Build, tmp_path: Path) -> None:
    numbers = {"input_resolution": 32, "context_length": 16, "vocab_size": 49408}
    state = {**build("tiny-test").state_dict(), **{key: torch.tensor(value) for key, value in numbers.items()}}
    torch.save(state, tmp_path / "openai.pt")
    with pytest.raises(CheckpointError, match=r"trained with QuickGELU.*OpenAI's input_resolution"):
        load_pretrained(build("tiny-test"), str(tmp_path / "openai.pt"))
    quick = build(ModelConfig.from_dict(_raw(quick_gelu=True)))
    assert "left out input_resolution" in load_pretrained(quick, str(tmp_path / "openai.pt")).converted


@pytest.mark.parametrize(
    ("settings", "quick_gelu"),
    [
        ({"model_type": "clip"}, True),
        ({"model_type": "clip", "vision_config": {"hidden_act": "gelu", "image_size": 336}}, False),
        ({"model_type": "siglip"}, False),
    ],
)
def test_transformers_configurations_say_what_they_leave_out_by_default(settings: Any, quick_gelu: bool) -> None:
    origin = find_origin({}, {"config.json": json.dumps(settings)}.get)
    assert origin.quick_gelu is quick_gelu
    side = settings.get("vision_config", {}).get("image_size", 224)
    assert origin.image_size == (side, side)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": "bert"}', '{"vision_cfg": 3}'])
def test_files_that_say_nothing_are_no_evidence(text: str) -> None:
    for name in ("model_config.json", "open_clip_config.json", "config.json"):
        assert find_origin({}, {name: text}.get) == Origin()
