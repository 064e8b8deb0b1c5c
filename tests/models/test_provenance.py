"""Numbers of preprocessing and the tokenizer's identity come with the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from models import (
    CheckpointError,
    ClipTokenizer,
    ConfigError,
    InferenceTransform,
    TokenizerIdentity,
    create_model,
    create_model_and_transforms,
    load_model_config,
    read_provenance,
    with_preprocess_of,
)

SIGLIP = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
CLIP_BPE = TokenizerIdentity.of(ClipTokenizer(16))


def _folder(path: Path, file: str = "open_clip_config.json", **settings: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / file).write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("file", ["open_clip_config.json", "model_config.json"])
def test_the_file_beside_the_weights_is_read_and_its_size_is_not(tmp_path: Path, file: str) -> None:
    found = read_provenance(str(_folder(tmp_path, file, preprocess_cfg=SIGLIP | {"size": 384})))
    assert found is not None
    assert found.preprocess == {**SIGLIP, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    config = with_preprocess_of(load_model_config("tiny-test"), found)
    assert (config.preprocess.mean, config.preprocess.resize_mode) == ((0.5, 0.5, 0.5), "squash")
    assert config.preprocess.size == load_model_config("tiny-test").preprocess.size


def test_weights_in_such_a_folder_are_described_too_but_no_stranger_beside_them(tmp_path: Path) -> None:
    folder = _folder(tmp_path, preprocess_cfg=SIGLIP)
    assert read_provenance(f"{folder}/open_clip_model.safetensors") == read_provenance(str(folder))
    assert read_provenance(f"{folder}/other.pt") is None


def test_a_url_is_read_as_a_path_is(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "here", preprocess_cfg={"mean": [0.1, 0.2, 0.3]})
    found = read_provenance(f"file://{folder}")
    assert found is not None and found.preprocess == {"mean": (0.1, 0.2, 0.3)}
    assert read_provenance(f"file://{tmp_path}/nothing") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid"),
        ("[]", "holds no settings"),
        ('{"preprocess_cfg": {"interpolation": "random"}}', "interpolation"),
        ('{"tokenizer": {"name": "x"}}', "missing key tokenizer.fingerprint"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "open_clip_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"open_clip_config.json.*{message}"):
        read_provenance(str(tmp_path))


def test_a_model_of_the_library_prepares_images_as_its_weights_want_them(tmp_path: Path) -> None:
    save_file(create_model("tiny-test").state_dict(), tmp_path / "open_clip_model.safetensors")
    _folder(tmp_path, preprocess_cfg=SIGLIP)
    _, train, inference = create_model_and_transforms("tiny-test", str(tmp_path), force_image_size=48)
    assert isinstance(inference, InferenceTransform)
    for transform in (train, inference):
        assert (transform.config.mean, transform.config.interpolation) == ((0.5, 0.5, 0.5), "bilinear")
        assert transform.size == (48, 48)


def test_an_identity_survives_the_file(tmp_path: Path) -> None:
    found = read_provenance(str(_folder(tmp_path, "model_config.json", tokenizer=CLIP_BPE.to_dict())))
    assert found is not None and found.tokenizer == CLIP_BPE
    assert CLIP_BPE.check(CLIP_BPE) is None


@pytest.mark.parametrize("change", [{"vocab_size": 32000}, {"pad_id": 1}, {"eos_id": 1}])
def test_a_tokenizer_of_other_ids_is_refused(change: dict[str, int]) -> None:
    (key,) = change
    with pytest.raises(ConfigError, match=f"clip-bpe has {key} .* trained with other, whose {key} is {change[key]}"):
        CLIP_BPE.check(TokenizerIdentity(**{**CLIP_BPE.to_dict(), "name": "other", **change}))


def test_other_rules_are_told() -> None:
    stored = TokenizerIdentity(**{**CLIP_BPE.to_dict(), "fingerprint": "0" * 16})
    assert "some texts get other ids" in str(CLIP_BPE.check(stored))
