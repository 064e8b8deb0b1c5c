"""Positions at another size: OpenCLIP's and timm's own numbers, and grids that are not square."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models import CLIP, CheckpointError, ModelConfig, build_model, config_with, load_model_config, load_pretrained
from models.positions import resize_positions

Build = Callable[[str | ModelConfig], CLIP]
TEXT = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}


def _saved(folder: Path, model: CLIP, with_config: bool = True) -> str:
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    if with_config:
        (folder / "model_config.json").write_text(json.dumps(model.config.to_dict()))
    return str(folder)


def _sized(name: str, size: Any) -> ModelConfig:
    return config_with(load_model_config(name), image_size=size)


@pytest.mark.parametrize(
    ("name", "old", "new", "key", "grids"),
    [
        ("tiny-test", (32, 64), (64, 32), "visual.positional_embedding", "4x8 to 8x4"),
        ("tiny-test", (32, 64), 48, "visual.positional_embedding", "4x8 to 6x6"),
        # As many cells in another arrangement: no shape shows it.
        ("tiny-test", (32, 128), 64, "visual.positional_embedding", "4x16 to 8x8"),
        ("tiny-test-rn", (32, 96), 64, "visual.attnpool.positional_embedding", "1x3 to 2x2"),
    ],
)
def test_weights_of_any_image_size_move_to_any_other_when_their_folder_says_it(
    build: Build, tmp_path: Path, name: str, old: Any, new: Any, key: str, grids: str
) -> None:
    source = _saved(tmp_path, build(_sized(name, old)))
    report = load_pretrained(build(_sized(name, new)), source)
    assert [(resized.key, resized.method) for resized in report.resized] == [(key, f"bicubic, grid {grids}")]


def test_the_same_grid_is_not_resampled(build: Build, tmp_path: Path) -> None:
    wide = build(_sized("tiny-test", (32, 64)))
    other = build(_sized("tiny-test", (32, 64)))
    assert load_pretrained(other, _saved(tmp_path, wide)).resized == ()
    assert torch.equal(other.visual.positional_embedding, wide.visual.positional_embedding)


def test_an_unknown_grid_is_refused_with_what_would_make_it_known(build: Build, tmp_path: Path) -> None:
    source = _saved(tmp_path, build(_sized("tiny-test", (32, 64))), with_config=False)
    with pytest.raises(CheckpointError, match=r"32 grid positions form no square.*open_clip_config\.json"):
        load_pretrained(build("tiny-test"), source)


def test_a_transposed_grid_gives_transposed_positions(build: Build) -> None:
    """Against a reference of its own: the cells of a picture that is turned on its side."""
    model = build(_sized("tiny-test", (64, 32)))
    wide = torch.randn(4, 8, 64)
    state = {"visual.positional_embedding": torch.cat([torch.zeros(1, 64), wide.flatten(0, 1)])}
    resize_positions(model, state, old_size=(32, 64))
    expected = torch.nn.functional.interpolate(
        wide.permute(2, 0, 1)[None], size=(8, 4), mode="bicubic", antialias=True
    )[0]
    actual = state["visual.positional_embedding"][1:].reshape(8, 4, 64).permute(2, 0, 1)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("custom_text", [False, True])
def test_positions_of_texts_are_interpolated_linearly_in_both_layouts(build: Build, custom_text: bool) -> None:
    raw = {**load_model_config("tiny-test").to_dict(), "custom_text": custom_text}
    short = build(ModelConfig.from_dict(raw))
    longer = build(config_with(short.config, context_length=31))
    state = dict(short.state_dict())
    resized = resize_positions(longer, state)
    key = "text.positional_embedding" if custom_text else "positional_embedding"
    assert [str(item) for item in resized] == [f"{key} [16, 64] -> [31, 64]: linear, length 16 to 31"]
    expected = torch.nn.functional.interpolate(short.state_dict()[key].T[None], size=31, mode="linear")[0].T
    torch.testing.assert_close(state[key], expected)


def test_the_class_token_of_a_text_tower_keeps_its_position_behind_the_text(build: Build) -> None:
    short = build("tiny-test-coca")
    length = short.config.text_cfg.context_length
    longer = build(config_with(short.config, context_length=length + 8))
    state = dict(short.state_dict())
    (resized,) = resize_positions(longer, state)
    assert resized.method == f"linear, length {length} to {length + 8}"
    assert state[resized.key].shape == longer.state_dict()[resized.key].shape
    assert torch.equal(state[resized.key][-1], short.state_dict()[resized.key][-1])


# Trunks of timm with positions of every kind: class and register tokens or none, map pool, rotary, relative, windows.
TRUNKS: dict[str, dict[str, Any]] = {
    "class token": {"timm_model_name": "test_vit", "timm_pool": "token", "sizes": (160, 96)},
    "register tokens": {"timm_model_name": "test_vit2", "timm_pool": "avg", "sizes": (160, 128)},
    "map pool and registers": {"timm_model_name": "test_vit3", "timm_pool": "map", "sizes": (160, 96)},
    "rotary and absolute": {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "avg", "sizes": (224, 140)},
    "windows": {"timm_model_name": "swin_tiny_patch4_window7_224", "timm_pool": "avg", "sizes": (224, 128)},
    "convolutions": {"timm_model_name": "test_convnext", "timm_pool": "", "sizes": (160, 96)},
}
_SLOW = ("rotary and absolute", "windows")


def _trunk_config(kind: str) -> tuple[dict[str, Any], tuple[int, int]]:
    vision = dict(TRUNKS[kind])
    sizes = vision.pop("sizes")
    vision |= {"timm_proj": "linear", "image_size": sizes[0]}
    return {"embed_dim": 32, "vision_cfg": vision, "text_cfg": TEXT}, sizes


@pytest.mark.parity
@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in _SLOW else k for k in TRUNKS])
def test_a_resized_trunk_of_timm_has_openclips_features(kind: str, tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    raw, (_, new) = _trunk_config(kind)
    path = tmp_path / f"resized-{TRUNKS[kind]['timm_model_name']}.json"
    path.write_text(json.dumps(raw))
    open_clip.add_model_config(path)
    small = open_clip.create_model(path.stem)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    torch.save(small.state_dict(), tmp_path / "small.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's interpolation of windows makes torch warn
        theirs = open_clip.create_model(path.stem, pretrained=str(tmp_path / "small.pt"), force_image_size=new).eval()
    ours = build_model(config_with(ModelConfig.from_dict(raw), image_size=new)).eval()
    load_pretrained(ours, str(tmp_path / "small.pt"))
    image = torch.randn(2, 3, new, new)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_image(image), theirs.encode_image(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in TRUNKS if kind not in _SLOW])
def test_a_trunk_of_timm_moves_to_a_size_that_is_not_square_and_back(build: Build, kind: str, tmp_path: Path) -> None:
    raw, _ = _trunk_config(kind)
    square = build(ModelConfig.from_dict(raw))
    wide = build(config_with(square.config, image_size=(64, 96)))
    there = load_pretrained(wide, _saved(tmp_path / "square", square))
    assert wide.eval().encode_image(torch.zeros(1, 3, 64, 96)).isfinite().all()
    back = load_pretrained(build(square.config), _saved(tmp_path / "wide", wide))
    assert [item.key for item in there.resized] == [item.key for item in back.resized]
    assert all("4x6" in item.method for item in (*there.resized, *back.resized))
    assert bool(there.resized) == (kind != "convolutions")
