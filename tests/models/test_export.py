"""Exports: what other libraries read is the same model, and what they cannot hold is refused before any work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import (
    CLIP,
    CheckpointError,
    ConfigError,
    ModelConfig,
    build_model,
    config_with,
    get_tokenizer,
    load_model_config,
)
from models.export import TARGETS, check_export, export_model
from models.export import to_transformers as hugging_face
from models.export.to_timm import TARGET as TIMM
from models.export.verify import GREY_LEVELS, draw_picture
from tests.helpers.large_models import cut_stacks, fill, without_initialisation

Build = Callable[[str | ModelConfig], CLIP]
CLEAN_TEXTS = ["it's 12 o'clock; we're LATE!!", "naïve café, 東京 🗼", "a " * 200, "x"]

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("quick_gelu", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_library_reads_the_native_towers_as_the_same_model(
    build: Build, tmp_path: Path, target: str, quick_gelu: bool
) -> None:
    model = build(config_with(load_model_config("tiny-test"), quick_gelu=quick_gelu))
    found = export_model(model, [target], tmp_path / "out")[target]
    assert found.image <= (1e-4 if target == "onnx" else 1e-5)
    assert found.grey_levels is None or found.grey_levels <= GREY_LEVELS
    assert (found.text is None) == (target == "timm")
    assert (found.caption is None) == (target in ("timm", "onnx"))


@pytest.mark.parametrize("name", ["tiny-test-rn", "tiny-test-timm", "tiny-test-coca"])
@pytest.mark.parametrize("target", ["openclip", pytest.param("onnx", marks=pytest.mark.slow)])
def test_openclip_and_onnx_hold_every_kind_of_tower(build: Build, tmp_path: Path, name: str, target: str) -> None:
    assert export_model(build(name), [target], tmp_path / "out")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) for n in ("convnext_large_d_320", "EVA02-B-16", "ViTamin-S")]
)
def test_trunks_go_back_to_timm_with_their_projection(tmp_path: Path, name: str) -> None:
    with without_initialisation():
        model = build_model(load_model_config(name))
    fill(model)
    assert export_model(model, ["timm"], tmp_path / "out")["timm"].image <= 1e-5


def test_siglip_goes_to_transformers_with_its_numbers(tmp_path: Path) -> None:
    config = load_model_config("ViT-B-16-SigLIP2")
    config = dataclasses.replace(config, text_cfg=dataclasses.replace(config.text_cfg, layers=1, vocab_size=99))
    with without_initialisation():
        model = build_model(config)
    cut_stacks(model, 1)
    fill(model)
    found = export_model(model, ["transformers"], tmp_path / "out")["transformers"]
    assert found.image <= 1e-5 and found.text is not None and found.text <= 1e-5
    assert found.grey_levels is not None and found.grey_levels <= GREY_LEVELS


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("tiny-test-rn", "transformers", "no ResNet as image tower; tiny-test-rn can go to openclip, onnx"),
        ("convnext_large_d_320", "transformers", "no convnext_large as image tower.*go to openclip, timm, onnx"),
        ("ViT-L-14-CLIPA", "transformers", "no vision_cfg.no_ln_pre True"),
        ("tiny-test-coca", "transformers", "no vision_cfg.attentional_pool True"),
        ("tiny-test-rn", "timm", "no ModifiedResNet"),
        ("tiny-test-timm", "timm", "an MLP as projection, which timm's test_convnext has no place for"),
        ("ViT-L-14-CLIPA", "timm", "vision_cfg.no_ln_pre True is not among the arguments"),
    ],
)
def test_what_a_library_cannot_hold_is_refused_and_the_others_are_named(
    tmp_path: Path, name: str, target: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"--to {target}: .*{reason}"):
        check_export(load_model_config(name), ["openclip", target], tmp_path / "out")


@pytest.mark.parametrize(
    ("section", "change", "reason"),
    [
        ("text_cfg", {"no_causal_mask": True}, "text_cfg.no_causal_mask True"),
        ("text_cfg", {"pool_type": "last"}, "text_cfg.pool_type 'last'"),
        ("vision_cfg", {"ls_init_value": 0.1}, "vision_cfg.ls_init_value 0.1"),
    ],
)
def test_a_setting_that_transformers_has_no_word_for_is_not_dropped(
    section: str, change: dict[str, object], reason: str
) -> None:
    config = load_model_config("tiny-test")
    config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **change)})
    with pytest.raises(ConfigError, match=reason):
        check_export(config, ["transformers"], Path("absent"))


def test_images_that_are_not_square_go_to_timm_and_not_to_transformers(build: Build, tmp_path: Path) -> None:
    config = config_with(load_model_config("tiny-test"), image_size=(32, 48))
    with pytest.raises(ConfigError, match="square"):
        check_export(config, ["transformers"], tmp_path / "out")
    assert export_model(build(config), ["timm"], tmp_path / "out")


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_the_way_that_pictures_are_resized_goes_along(build: Build, tmp_path: Path, resize_mode: str) -> None:
    model = build(
        config_with(load_model_config("tiny-test"), image_resize_mode=resize_mode, image_mean=(0.1, 0.2, 0.3))
    )
    for found in export_model(model, ["openclip", "timm"], tmp_path / "out").values():
        assert found.grey_levels is not None and found.grey_levels <= GREY_LEVELS


@pytest.mark.parametrize("target", ["timm", "transformers"])
def test_padding_to_the_longest_side_is_refused_where_pictures_would_be_cropped(target: str) -> None:
    config = config_with(load_model_config("tiny-test"), image_resize_mode="longest")
    with pytest.raises(ConfigError, match="do not fit the longest side"):
        check_export(config, [target], Path("absent"))


def test_another_mean_would_be_noticed(build: Build, tmp_path: Path) -> None:
    model = build("tiny-test")
    export_model(model, ["timm"], tmp_path / "out")
    other = build(config_with(model.config, image_mean=(0.1, 0.2, 0.3)))
    prepare = TIMM.read(tmp_path / "out" / "timm", other).prepare
    assert prepare is not None
    wanted = build_transform(other)(draw_picture(0))
    levels = 255 * torch.tensor(other.config.preprocess.std).view(3, 1, 1)
    assert float(((prepare(draw_picture(0))[0] - wanted) * levels).abs().mean()) > 20 * GREY_LEVELS


def build_transform(model: CLIP) -> Callable[..., torch.Tensor]:
    from models import InferenceTransform

    return InferenceTransform(model.config.preprocess)


def test_weights_that_came_out_wrong_leave_nothing(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = hugging_face.Transformers.write

    def write_wrongly(self: hugging_face.Transformers, model: CLIP, folder: Path) -> None:
        write(self, model, folder)
        state = load_file(folder / "model.safetensors")
        state["visual_projection.weight"] = state["visual_projection.weight"].flip(0).contiguous()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(hugging_face.Transformers, "write", write_wrongly)
    with pytest.raises(CheckpointError, match="transformers gives other features than this model: image"):
        export_model(build("tiny-test"), ["openclip", "transformers"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_content_is_kept_unless_it_may_be_overwritten(build: Build, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        export_model(build("tiny-test"), ["timm"], tmp_path)
    export_model(build("tiny-test"), ["timm"], tmp_path, overwrite=True)
    export_model(build("tiny-test"), ["timm"], tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "timm"]


def test_the_exported_tokenizer_gives_the_ids_of_ours(build: Build, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = build("tiny-test")
    export_model(model, ["transformers"], tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "transformers", local_files_only=True)
    theirs = tokenizer(CLEAN_TEXTS, truncation=True)["input_ids"]
    ours = get_tokenizer(model.config)(CLEAN_TEXTS)
    assert theirs == [row[: int(row.argmax()) + 1].tolist() for row in ours]
