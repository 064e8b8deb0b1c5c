"""Bad files: what would run code runs nothing at any entry, what is damaged is named, what is not read is said."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models import CLIP, CheckpointError, ModelConfig, create_model, load_pretrained, read_weights

Build = Callable[[str | ModelConfig], CLIP]


class Malicious:
    """Pickled, a command that leaves a file where it ran."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


WRITERS: dict[str, Callable[[Any, Path], None]] = {
    "archive": lambda content, path: torch.save(content, path),
    "old format": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "plain pickle": lambda content, path: path.write_bytes(pickle.dumps(content)),
    "protocol 0": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=0)),
}
PLACES = ["w.pt", "w.pth", "w.bin", "w.ckpt", "w.safetensors", "model.safetensors", "folder/pytorch_model.bin"]
PLACES += ["folder/open_clip_pytorch_model.bin", "folder/model.safetensors"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("writer", WRITERS)
def test_code_in_a_pickle_is_refused_and_not_run(writer: str, place: str, tmp_path: Path) -> None:
    path, canary = tmp_path / place, tmp_path / "canary"
    path.parent.mkdir(exist_ok=True)
    WRITERS[writer]({"state_dict": {"a": torch.zeros(1)}, "extra": Malicious(canary)}, path)
    source = path.parent if place.startswith("folder/") else path
    for read in (read_weights, lambda name: create_model("tiny-test", pretrained=name)):
        with pytest.raises(CheckpointError, match=f"{source}.*(refused|neither a safetensors nor a PyTorch file)"):
            read(str(source))
    assert not canary.exists()


def test_the_canary_lives_where_nothing_refuses_it(tmp_path: Path) -> None:
    """What the tests above would miss if the pickle were harmless."""
    pickle.loads(pickle.dumps(Malicious(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def _flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


def test_a_flipped_bit_in_an_archives_tensor_is_named_by_its_checksum(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "flipped.pt"
    torch.save({"state_dict": build("tiny-test").state_dict()}, path)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    _flip(path, largest.header_offset + 30 + len(largest.filename) + largest.file_size // 2)
    torch.load(path, weights_only=True)  # which sees nothing
    with pytest.raises(CheckpointError, match=rf"flipped\.pt is corrupt: its record {largest.filename} differs"):
        load_pretrained(build("tiny-test"), str(path))


@pytest.mark.parametrize("offset", range(0, 400, 37))
def test_a_flipped_bit_in_a_safetensors_header_is_an_error_that_names_the_file(
    build: Build, tmp_path: Path, offset: int
) -> None:
    path = tmp_path / "flipped.safetensors"
    save_file(build("tiny-test").state_dict(), path)
    _flip(path, offset)
    with pytest.raises(CheckpointError, match=r"flipped\.safetensors"):
        load_pretrained(build("tiny-test"), str(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(build: Build, tmp_path: Path, value: float) -> None:
    state = {key: tensor.clone() for key, tensor in build("tiny-test").state_dict().items()}
    state["visual.proj"][3, 5] = value
    save_file(state, tmp_path / "weights.safetensors")
    model = build("tiny-test")
    before = model.visual.proj.detach().clone()
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: visual\.proj has values that are no finite"):
        load_pretrained(model, str(tmp_path / "weights.safetensors"))
    assert torch.equal(model.visual.proj, before)


def test_big_visions_archives_are_refused_with_a_way_to_use_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "siglip.npz", **{"params/img/embedding/kernel": np.zeros(2)})
    with pytest.raises(CheckpointError, match=r"siglip\.npz is a NumPy archive .*load it with OpenCLIP"):
        read_weights(str(tmp_path / "siglip.npz"))


@pytest.mark.parametrize("index", ["", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "gone.safetensors"}}'])
def test_an_index_of_parts_that_says_nothing_or_names_none_is_an_error(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        read_weights(str(tmp_path))


def test_an_index_of_parts_reaches_no_other_folder(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "outside.safetensors")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"outside\.safetensors is missing"):
        read_weights(str(inside))
    shutil.copy(tmp_path / "outside.safetensors", inside)
    assert read_weights(str(inside)).keys() == {"a"}
