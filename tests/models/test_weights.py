"""Weights from every source and in every wrapping; resizes are listed, misfits explained, code never run."""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models import (
    CLIP,
    CheckpointError,
    ModelConfig,
    config_with,
    create_model,
    load_model_config,
    load_pretrained,
    read_weights,
)
from tests.models.conftest import FAMILIES

Build = Callable[[str | ModelConfig], CLIP]


@pytest.fixture
def trained(build: Build) -> CLIP:
    """A model whose weights no other model here has."""
    model = build("tiny-test")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    return model


def _assert_same(model: CLIP, other: CLIP) -> None:
    expected, actual = other.state_dict(), model.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def _trainer_checkpoint(model: CLIP) -> dict[str, Any]:
    """What OpenCLIP's trainer writes under DDP, the numpy learning rate of its schedule included."""
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.param_groups[0]["lr"] = np.cos(np.float64(0.1))
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    return {"epoch": 3, "name": "run", "state_dict": state, "optimizer": optimizer.state_dict()}


def _written(folder: Path, form: str, model: CLIP) -> str:
    state = model.state_dict()
    path = folder / form
    if form == "folder":
        path.mkdir()
        save_file(state, path / "model.safetensors")
    elif form.endswith(".safetensors"):
        save_file(state, path)
    elif form == "trainer.pt":
        torch.save(_trainer_checkpoint(model), path)
    elif form == "old_format.pt":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif form == "compiled.pt":
        wrapped = {f"module._orig_mod.{key.replace('.ln_1', '._orig_mod.ln_1')}": v for key, v in state.items()}
        torch.save({"state_dict": wrapped}, path)
    else:
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize(
    ("form", "converted"),
    [
        ("folder", ()),
        ("bare.safetensors", ()),
        ("bare.bin", ()),
        ("trainer.pt", ("stripped module.",)),
        ("old_format.pt", ()),
        ("compiled.pt", ("stripped module.", "stripped _orig_mod.")),
    ],
)
def test_every_form_loads_exactly(
    build: Build, trained: CLIP, tmp_path: Path, form: str, converted: tuple[str, ...]
) -> None:
    model, source = build("tiny-test"), _written(tmp_path, form, trained)
    report = load_pretrained(model, source)
    _assert_same(model, trained)
    assert (report.source, report.num_tensors) == (source, len(trained.state_dict()))
    assert (report.converted, report.resized) == (converted, ())
    assert "resized: nothing" in str(report)


def test_read_weights_gives_the_names_of_a_bare_model(trained: CLIP, tmp_path: Path) -> None:
    state = read_weights(_written(tmp_path, "trainer.pt", trained))
    assert state.keys() == trained.state_dict().keys()


def test_create_model_loads_what_pretrained_names(trained: CLIP, tmp_path: Path) -> None:
    _assert_same(create_model("tiny-test", pretrained=_written(tmp_path, "trainer.pt", trained)), trained)


@pytest.mark.parametrize("form", ["bare.safetensors", "trainer.pt", "folder"])
def test_a_url_of_any_storage_is_read(build: Build, trained: CLIP, tmp_path: Path, form: str) -> None:
    source = _written(tmp_path, form, trained)
    memory = fsspec.filesystem("memory")
    memory.put(source, f"/weights/{form}", recursive=True)
    model = build("tiny-test")
    load_pretrained(model, f"memory://weights/{form}")
    _assert_same(model, trained)


def test_an_s3_url_is_read_from_the_endpoint_of_the_environment(
    build: Build, trained: CLIP, tmp_path: Path, s3_server: Any
) -> None:
    url = s3_server.upload(Path(_written(tmp_path, "trainer.pt", trained)), "models-test/epoch_3.pt")
    model = build("tiny-test")
    load_pretrained(model, url)
    _assert_same(model, trained)
    with pytest.raises(CheckpointError, match="no such object"):
        load_pretrained(model, url.replace("epoch_3", "epoch_4"))


def test_half_precision_weights_fill_an_fp32_model(build: Build, trained: CLIP, tmp_path: Path) -> None:
    save_file({key: value.bfloat16() for key, value in trained.state_dict().items()}, tmp_path / "half.safetensors")
    model = build("tiny-test")
    load_pretrained(model, str(tmp_path / "half.safetensors"))
    assert model.text_projection.dtype == torch.float32
    torch.testing.assert_close(model.text_projection, trained.text_projection, rtol=1e-2, atol=1e-3)


def test_text_keys_move_between_openclips_two_layouts(build: Build, trained: CLIP, tmp_path: Path) -> None:
    raw = {**load_model_config("tiny-test").to_dict(), "custom_text": True}
    custom = build(ModelConfig.from_dict(raw))
    report = load_pretrained(custom, _written(tmp_path, "bare.bin", trained))
    assert report.converted == ("text keys moved under text.",)
    back = build("tiny-test")
    assert load_pretrained(back, _written(tmp_path, "custom.bin", custom)).converted == ("text keys unpacked",)
    _assert_same(back, trained)


def test_temperatures_of_other_shapes_and_missing_biases_are_adapted(
    build: Build, trained: CLIP, tmp_path: Path
) -> None:
    state = dict(trained.state_dict())
    state["logit_scale"] = state["logit_scale"].reshape(1)
    torch.save(state, tmp_path / "old.pt")
    model = build(ModelConfig.from_dict({**load_model_config("tiny-test").to_dict(), "init_logit_bias": -10.0}))
    report = load_pretrained(model, str(tmp_path / "old.pt"))
    assert report.converted == ("made logit_scale a scalar", "added logit_bias 0")
    assert model.logit_bias.item() == 0


@pytest.mark.parametrize("name", [*FAMILIES, "vit_of_timm"])
def test_another_image_size_and_context_length_resize_the_positions_and_say_so(
    build: Build, tmp_path: Path, name: str
) -> None:
    config = _timm_vit() if name == "vit_of_timm" else load_model_config(name)
    source = _written(tmp_path, "bare.bin", build(config))
    larger = build(config_with(config, image_size=(96, 128), context_length=24))
    report = load_pretrained(larger, source)
    text = "positional_embedding [16, 64] -> [24, 64]: linear, length 16 to 24"
    visual = {
        "tiny-test": ["visual.positional_embedding [17, 64] -> [193, 64]: bicubic, grid 4x4 to 12x16"],
        "tiny-test-rn": ["visual.attnpool.positional_embedding [5, 256] -> [13, 256]: bicubic, grid 2x2 to 3x4"],
        "tiny-test-timm": [],
        "vit_of_timm": ["visual.trunk.pos_embed [1, 17, 64] -> [1, 49, 64]: bicubic, grid 4x4 to 6x8"],
    }[name]
    assert [str(resized) for resized in report.resized] == [*visual, text]
    assert all(line in str(report) for line in [*visual, text])
    assert larger.eval()(torch.zeros(1, 3, 96, 128))[0].isfinite().all()


def test_a_resize_keeps_the_class_token_and_the_mean_position(build: Build, trained: CLIP, tmp_path: Path) -> None:
    larger = build(config_with(trained.config, image_size=64))
    load_pretrained(larger, _written(tmp_path, "bare.bin", trained))
    old, new = trained.visual.positional_embedding, larger.visual.positional_embedding
    assert torch.equal(new[0], old[0])
    torch.testing.assert_close(new[1:].mean(0), old[1:].mean(0), rtol=0.1, atol=0.05)


def test_a_grid_that_is_not_square_cannot_be_resized(build: Build, trained: CLIP, tmp_path: Path) -> None:
    wide = build(config_with(trained.config, image_size=(32, 48)))
    source = _written(tmp_path, "bare.bin", wide)
    with pytest.raises(CheckpointError, match=r"bare\.bin: visual\.positional_embedding: 24 grid positions form no"):
        load_pretrained(build("tiny-test"), source)


def test_another_architecture_is_refused_with_the_first_differences_and_the_model_that_fits(
    build: Build, tmp_path: Path
) -> None:
    source = _written(tmp_path, "rn.bin", build("tiny-test-rn"))
    model = build("tiny-test")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(model, source)
    message = str(caught.value)
    assert message.startswith(f"{source} does not fit model tiny-test: 31 missing: visual.class_embedding, ")
    assert "unexpected: visual.bn1.weight, " in message
    assert "1 of another shape: visual.conv1.weight [4, 3, 3, 3] in the file, [64, 3, 8, 8] in the model" in message
    assert message.endswith("; it fits tiny-test-rn")
    assert "\n" not in message
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class _Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("write", ["torch", "pickle"])
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(build: Build, tmp_path: Path, write: str) -> None:
    path, mark = tmp_path / "evil.pt", tmp_path / "mark"
    if write == "torch":
        torch.save({"state_dict": {"a": torch.zeros(1)}, "extra": _Malicious(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(_Malicious(mark)))
    with pytest.raises(CheckpointError, match=r"evil\.pt is refused"):
        load_pretrained(build("tiny-test"), str(path))
    assert not mark.exists()


@pytest.mark.parametrize("form", ["bare.safetensors", "trainer.pt", "old_format.pt"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named_with_what_is_wrong(
    build: Build, trained: CLIP, tmp_path: Path, form: str, kept: float
) -> None:
    path = Path(_written(tmp_path, form, trained))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(CheckpointError, match=f"{form}.*(is truncated or corrupt|the file is empty)"):
        load_pretrained(build("tiny-test"), str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "neither a safetensors nor a PyTorch file"),
    ],
)
def test_what_is_no_weights_file_is_said(build: Build, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(build("tiny-test"), str(path))


def test_a_program_instead_of_weights_is_named(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; its archives remain
        torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_weights(str(tmp_path / "model.pt"))


@pytest.mark.parametrize(
    ("loaded", "message"),
    [({"epoch": 1}, "holds no weights; its keys are epoch"), ([1, 2], "holds a list, not a state dict")],
)
def test_a_file_without_weights_is_refused(tmp_path: Path, loaded: object, message: str) -> None:
    torch.save(loaded, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=message):
        read_weights(str(tmp_path / "other.pt"))


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.pt: no such file"):
        read_weights(str(tmp_path / "gone.pt"))
    (tmp_path / "epoch_1").mkdir()
    (tmp_path / "epoch_1" / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"epoch_1 has no model\.safetensors; it holds notes\.txt"):
        read_weights(str(tmp_path / "epoch_1"))


def test_weights_stay_readable_after_the_file_is_gone(trained: CLIP, tmp_path: Path) -> None:
    source = _written(tmp_path, "folder", trained)
    state: dict[str, Tensor] = read_weights(source)
    shutil.rmtree(source)
    assert torch.equal(state["visual.proj"], trained.visual.proj)


def _timm_vit() -> ModelConfig:
    raw = load_model_config("tiny-test-timm").to_dict()
    vision = {**raw["vision_cfg"], "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
    return ModelConfig.from_dict({**raw, "vision_cfg": vision})
