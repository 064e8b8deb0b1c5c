"""`scripts.export`: from a checkpoint to a folder for other libraries, and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import models
from models.export.to_timm import Timm
from scripts.export import main


def _checkpoint(folder: Path, name: str) -> Path:
    torch.manual_seed(1)
    model = models.create_model(name)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "model_config.json").write_text(json.dumps(model.config.to_dict()))
    return folder


def test_a_checkpoint_goes_to_several_libraries_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = _checkpoint(tmp_path / "epoch_1", "tiny-test")
    assert main(["--to", "transformers", "--to", "timm", str(checkpoint), str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "timm", "transformers"]
    assert capsys.readouterr().out.count("differs from the checkpoint by at most image") == 2


def test_a_refusal_comes_before_the_weights_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--to", "transformers", "--model", "tiny-test-rn", str(tmp_path / "absent.pt"), str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "no ResNet as image tower; tiny-test-rn can go to openclip, onnx" in capsys.readouterr().err


def test_weights_that_know_no_model_need_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--to", "openclip", str(tmp_path / "model.safetensors"), str(tmp_path / "out")]) == 2
    assert "--model is needed" in capsys.readouterr().err


def test_files_that_give_other_features_end_with_1_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Timm.write

    def write_another(self: Timm, model: models.CLIP, folder: Path) -> None:
        torch.manual_seed(2)
        write(self, models.create_model("tiny-test"), folder)

    monkeypatch.setattr(Timm, "write", write_another)
    checkpoint = _checkpoint(tmp_path / "epoch_1", "tiny-test")
    assert main(["--to", "timm", str(checkpoint), str(tmp_path / "out")]) == 1
    assert "timm gives other features than this model: image" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_that_a_library_cannot_read_end_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Timm, "write", lambda self, model, folder: (folder / "config.json").write_text("{}"))
    checkpoint = _checkpoint(tmp_path / "epoch_1", "tiny-test")
    assert main(["--to", "timm", str(checkpoint), str(tmp_path / "out")]) == 1
    assert "--to timm: it cannot read what was written for it" in capsys.readouterr().err
