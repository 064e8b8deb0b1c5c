"""Configurations: strict decoding, names, round trips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models import ConfigError, ModelConfig, build_model, config_with, list_models, load_model_config

BASIC = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 16, "width": 64, "heads": 2, "layers": 2},
}


def _basic(**vision: Any) -> dict[str, Any]:
    return {**BASIC, "vision_cfg": {**BASIC["vision_cfg"], **vision}}  # type: ignore[dict-item]


@pytest.mark.parametrize("name", list_models())
def test_every_registered_model_decodes_and_survives_a_round_trip_through_json(name: str) -> None:
    config = load_model_config(name)
    assert config.name == name
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_changed_config_survives_a_round_trip() -> None:
    raw = _basic(norm_kwargs={"eps": 1e-6}, act_kwargs={"approximate": "tanh"}, ls_init_value=1e-4)
    config = config_with(ModelConfig.from_dict(raw, "x"), image_size=(48, 32), image_mean=(0.5, 0.5, 0.5))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_model_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'vit-b32'.*did you mean ViT-B-32"):
        load_model_config("vit-b32")


def test_an_unknown_key_is_named_with_its_path_and_the_nearest_key() -> None:
    with pytest.raises(ConfigError, match=r"unknown key vision_cfg\.pach_size; did you mean patch_size"):
        ModelConfig.from_dict(_basic(pach_size=8))


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match="missing key embed_dim"):
        ModelConfig.from_dict({key: value for key, value in BASIC.items() if key != "embed_dim"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ls_init_value: 1e-4", r"vision_cfg\.ls_init_value: expected number or null, got '1e-4' \(YAML reads"),
        ("pool_type: no", r"vision_cfg\.pool_type: expected text, got False \(YAML reads yes, no"),
        ("layers: true", r"vision_cfg\.layers: expected whole number or a list of whole numbers, got True"),
        ("width: 64.0", r"vision_cfg\.width: expected whole number, got 64\.0"),
        ("layers: [1, two, 3, 4]", r"vision_cfg\.layers: expected"),
    ],
)
def test_what_yaml_reads_as_another_type_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(f"embed_dim: 32\nvision_cfg:\n  {text}\ntext_cfg: {{}}\n")
    with pytest.raises(ConfigError, match=message):
        load_model_config(str(path))


def test_a_whole_number_is_taken_where_a_number_is_expected() -> None:
    assert ModelConfig.from_dict(_basic(mlp_ratio=4)).vision_cfg.mlp_ratio == 4.0


def test_a_json_file_in_openclips_schema_is_a_model(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(BASIC))
    config = load_model_config(str(path))
    assert (config.name, config.vision_cfg.width, config.preprocess.size) == ("mine", 64, 32)


def test_a_hub_style_file_with_model_cfg_and_preprocess_cfg_is_a_model(tmp_path: Path) -> None:
    path = tmp_path / "open_clip_config.json"
    preprocess = {"size": [32, 32], "mode": "RGB", "mean": [0.5, 0.5, 0.5], "resize_mode": "squash"}
    path.write_text(json.dumps({"model_cfg": BASIC, "preprocess_cfg": preprocess}))
    config = load_model_config(str(path))
    assert config.preprocess.mean == (0.5, 0.5, 0.5)
    assert config.preprocess.resize_mode == "squash"


@pytest.mark.parametrize("name", ["missing.yaml", "broken.json"])
def test_an_unreadable_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "broken.json").write_text('{"embed_dim": ')
    with pytest.raises(ConfigError, match=name):
        load_model_config(str(tmp_path / name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multimodal_cfg": {}}, "custom_text must be true for a CoCa"),
        ({"multimodal_cfg": {}, "custom_text": True}, "multimodal_cfg.width 512: the tokens of vision_cfg"),
        ({"nonscalar_logit_scale": True}, "scalar"),
        ({"text_cfg": {"width": 65, "heads": 2}}, "no multiple of heads"),
        (_basic(attentional_pool="parallel"), "attentional_pool"),
        (_basic(qk_norm=True), "qk_norm"),
        (_basic(head_width=48), "no multiple of head_width"),
        (_basic(pool_type="max"), "pool_type"),
        (_basic(patch_dropout=1.0), "patch_dropout"),
        (_basic(layers=[1, 1, 1]), "four stages"),
        (_basic(layers=[1, 1, 1, 1], image_size=40), "multiples of 32"),
        (_basic(timm_model_name="convnxt_tiny"), "did you mean.*convnext_tiny"),
        (_basic(timm_model_name="test_convnext", timm_proj="linaer"), "timm_proj"),
        ({"preprocess_cfg": {"size": 64}}, "differs from vision_cfg.image_size"),
        ({"preprocess_cfg": {"interpolation": "random"}}, "interpolation"),
    ],
)
def test_what_no_tower_can_be_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(ModelConfig.from_dict({**BASIC, **change}))


def test_config_with_changes_the_image_size_everywhere_and_nothing_else() -> None:
    config = load_model_config("tiny-test")
    changed = config_with(config, image_size=(48,), context_length=None, image_mean=())
    assert changed.vision_cfg.image_size == changed.preprocess.size == 48
    assert config_with(changed, image_size=32) == config
    assert config_with(config) == config
