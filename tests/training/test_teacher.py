"""Which teachers fit a student, and that every rank has the same frozen one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import models
from tests.helpers.gloo import run_ranks
from training.config import ClusterConfig, ModelConfig
from training.distributed import World, session
from training.errors import CheckpointError, ConfigError
from training.teacher import build_teacher, resolve_teacher

STUDENT = models.load_model_config("tiny-test")


def _weights(path: Path) -> ModelConfig:
    torch.manual_seed(5)
    save_file(models.build_model(STUDENT).state_dict(), path)
    return ModelConfig(distill_model="tiny-test", distill_pretrained=str(path))


def test_there_is_no_teacher_unless_one_is_named() -> None:
    assert resolve_teacher(ModelConfig(), STUDENT) is None
    assert build_teacher(ModelConfig(), None, World()) is None


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (models.config_with(STUDENT, context_length=12), "context_length is 16, the student's 12"),
        (models.config_with(STUDENT, image_size=64), "takes images of 32, the student of 64.*--force-image-size"),
        (models.config_with(STUDENT, image_mean=(0.5, 0.5, 0.5)), "--image-mean and --image-std"),
        (
            dataclasses.replace(STUDENT, text_cfg=dataclasses.replace(STUDENT.text_cfg, vocab_size=32000)),
            "vocab_size is 49408, the student's 32000",
        ),
    ],
)
def test_a_teacher_that_would_read_the_batches_otherwise_is_refused(student: models.ModelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=f"--distill-model tiny-test: .*{message}"):
        resolve_teacher(ModelConfig(distill_model="tiny-test", distill_pretrained="x"), student)


def test_an_unknown_teacher_is_named_with_its_flag() -> None:
    with pytest.raises(ConfigError, match="--distill-model: unknown model 'nope'"):
        resolve_teacher(ModelConfig(distill_model="nope", distill_pretrained="x"), STUDENT)


def test_a_teacher_has_its_weights_and_nothing_to_train(tmp_path: Path) -> None:
    section = _weights(tmp_path / "teacher.safetensors")
    teacher = build_teacher(section, resolve_teacher(section, STUDENT), World())
    assert teacher is not None and not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    torch.manual_seed(5)
    want = models.build_model(STUDENT).state_dict()
    assert all(torch.equal(value, want[key]) for key, value in teacher.state_dict().items())


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    section = ModelConfig(distill_model="tiny-test", distill_pretrained=str(tmp_path / "none.safetensors"))
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        build_teacher(section, STUDENT, World())


def _checksum(section: ModelConfig) -> float:
    with session(ClusterConfig(device="cpu")) as world:
        torch.manual_seed(world.rank)
        teacher = build_teacher(section, STUDENT, world)
        assert teacher is not None
        return float(sum(p.double().sum() for p in teacher.parameters()))


def test_every_rank_has_the_teacher_that_rank_0_read(tmp_path: Path) -> None:
    first, second = run_ranks(_checksum, 2, _weights(tmp_path / "teacher.safetensors"))
    assert first == second
