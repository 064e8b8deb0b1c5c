"""Runs that start from weights with numbers and tokenizers of their own, and runs of transformers' text towers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from tests.helpers.hf import hf_model, save_encoder, save_unigram
from tests.helpers.shards import write_shards
from training.main import main

FLAGS = [
    *("--precision", "fp32", "--device", "cpu", "--batch-size", "8", "--workers", "0", "--epochs", "1"),
    *("--warmup", "1", "--lr", "1e-4", "--log-every-n-steps", "1", "--progress", "lines", "--name", "run"),
]
SIGLIP = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
Run = Callable[..., int]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two steps."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [16])
    return f"{folder}/shard-00000.tar"


@pytest.fixture
def run(shards: str, tmp_path: Path) -> Run:
    """`run(*flags)`: one run in this process; the exit code."""
    return lambda *flags: main([*FLAGS, "--train-data", shards, "--logs", str(tmp_path), *flags])


def _stored(logs: Path, checkpoint: str = "epoch_1") -> dict[str, Any]:
    return json.loads((logs / "run" / "checkpoints" / checkpoint / "model_config.json").read_text())


def _log(logs: Path, name: str = "run") -> str:
    return (logs / name / "train.log").read_text()


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Weights in OpenCLIP's form that were trained as SigLIP's."""
    folder = tmp_path / "published"
    folder.mkdir()
    save_file(models.create_model("tiny-test").state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": SIGLIP}))
    return folder


def test_numbers_of_the_weights_go_on_in_the_run_and_in_its_resume(run: Run, published: Path, tmp_path: Path) -> None:
    flags = ("--model", "tiny-test", "--pretrained", str(published))
    assert run(*flags, "--stop-after-steps", "1") == 75
    assert "images: mean is (0.5, 0.5, 0.5), as " in _log(tmp_path)
    shutil.rmtree(published)
    assert run(*flags, "--resume", "latest") == 0
    assert _stored(tmp_path)["preprocess_cfg"].items() >= SIGLIP.items()


def test_a_flag_wins_over_the_numbers_of_the_weights_and_the_log_warns(
    run: Run, published: Path, tmp_path: Path
) -> None:
    flags = ("--image-mean", "0.1", "0.2", "0.3")
    assert run("--model", "tiny-test", "--pretrained", str(published), *flags) == 0
    assert "mean is (0.1, 0.2, 0.3) by its flag; the weights were trained with (0.5, 0.5, 0.5)" in _log(tmp_path)
    assert _stored(tmp_path)["preprocess_cfg"]["mean"] == [0.1, 0.2, 0.3]
    assert _stored(tmp_path)["preprocess_cfg"]["std"] == [0.5] * 3


def test_a_checkpoint_names_its_tokenizer(run: Run, tmp_path: Path) -> None:
    assert run("--model", "tiny-test") == 0
    tokenizer = models.ClipTokenizer(16)
    assert _stored(tmp_path)["tokenizer"] == models.TokenizerIdentity.of(tokenizer).to_dict()


@pytest.fixture
def multilingual(tmp_path: Path) -> Path:
    """A model whose text tower is a tiny published one of transformers."""
    encoder = save_encoder(tmp_path / "encoder", "xlm-roberta", weights=True)
    tokenizer = save_unigram(tmp_path / "tokenizer", pad_first=False)
    raw = hf_model(encoder, tokenizer, hf_model_pretrained=True).to_dict()
    (path := tmp_path / "multilingual.json").write_text(json.dumps(raw))
    return path


def test_a_run_with_a_tower_of_transformers_starts_from_its_weights_and_resumes_elsewhere(
    run: Run, multilingual: Path, tmp_path: Path
) -> None:
    flags = ("--model", str(multilingual), "--grad-checkpointing", "--accum-freq", "2", "--batch-size", "4")
    assert run(*flags, "--lr", "1e-9", "--workers", "1", "--stop-after-steps", "1") == 75
    assert "text tower starts from" in _log(tmp_path)
    published = load_file(tmp_path / "encoder" / "model.safetensors")
    trained = load_file(tmp_path / "run/checkpoints/step_000000001/model.safetensors")
    key = "encoder.layer.0.output.dense.weight"
    torch.testing.assert_close(trained[f"text.transformer.{key}"], published[key], rtol=0, atol=1e-6)
    (tmp_path / "encoder" / "model.safetensors").unlink()
    shutil.move(tmp_path / "tokenizer", tmp_path / "moved")
    assert run(*flags, "--resume", "latest", "--tokenizer", str(tmp_path / "moved")) == 0


def test_a_resume_with_another_tokenizer_is_refused(run: Run, multilingual: Path, tmp_path: Path) -> None:
    assert run("--model", str(multilingual), "--stop-after-steps", "1") == 75
    other = shutil.copytree(tmp_path / "tokenizer", tmp_path / "other")
    described = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(described.replace('"NFKC"', '"Lowercase"'), encoding="utf-8")
    assert run("--model", str(multilingual), "--resume", "latest", "--tokenizer", str(other)) == 2
    assert "some texts get other ids" in _log(tmp_path)
    flags = ("--pretrained", str(tmp_path / "run/checkpoints/step_000000001"), "--tokenizer", str(other))
    assert run("--model", str(multilingual), *flags, "--name", "again") == 0
    assert "some texts get other ids" in _log(tmp_path, "again")
