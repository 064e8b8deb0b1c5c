"""`scripts.evaluate`: from a checkpoint to a table, and its mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import models
from scripts import evaluate
from tests.helpers.shards import write_shards
from tests.training.evaluation.conftest import write_labelled
from training.config import DataConfig, EvalConfig
from training.distributed import World
from training.evaluation.standalone import evaluate_checkpoint

QUICK = ("--device", "cpu", "--workers", "1", "--batch-size", "4")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights and their model's configuration."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(1)
    model = models.create_model("tiny-test")
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "model_config.json").write_text(json.dumps(model.config.to_dict()))
    return folder


def test_a_folder_is_evaluated_on_all_sets(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = write_labelled(tmp_path / "shapes")
    write_shards(tmp_path / "pairs", [5])
    sets = ("--zeroshot-data", f"shapes={labelled}", "--val-data", str(tmp_path / "pairs"))
    output = tmp_path / "out" / "figures.json"
    assert evaluate.main(["--checkpoint", str(checkpoint), *sets, *QUICK, "--json", str(output)]) == 0
    figures = json.loads(output.read_text())
    assert {"val/shapes-zeroshot-top1", "val/image_to_text_R@1"} <= figures.keys()
    assert f"{figures['val/clip_val_loss']:.4f}" in capsys.readouterr().out


def test_a_weights_file_needs_its_model_and_gives_the_same_figures(checkpoint: Path, tmp_path: Path) -> None:
    sets, weights = (
        EvalConfig(zeroshot_data=(f"shapes={write_labelled(tmp_path / 's')}",)),
        checkpoint / "model.safetensors",
    )
    by_folder = evaluate_checkpoint(str(checkpoint), None, sets, DataConfig(), World())
    assert evaluate_checkpoint(str(weights), "tiny-test", sets, DataConfig(), World()) == by_folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--checkpoint", "{folder}"), "nothing to evaluate: give --zeroshot-data, --imagenet-val,"),
        (("--checkpoint", "{alone}", "--val-data", "x.tar"), "--model is needed"),
        (("--checkpoint", "{folder}", "--val-data", "nowhere.tar"), "nowhere.tar"),
        (("--checkpoint", "{folder}", "--zeroshot-data", "a=nowhere"), "there is no folder nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    checkpoint: Path, flags: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = shutil.copy(checkpoint / "model.safetensors", tmp_path)
    assert evaluate.main([flag.format(folder=checkpoint, alone=alone) for flag in flags] + [*QUICK]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_a_broken_image_is_an_error_outside_of_training(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = write_labelled(tmp_path / "shapes", broken=10)
    assert evaluate.main(["--checkpoint", str(checkpoint), "--zeroshot-data", f"shapes={labelled}", *QUICK]) == 1
    assert "s0000010" in capsys.readouterr().err


def test_a_table_that_cannot_be_written_is_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ("--zeroshot-data", f"shapes={write_labelled(tmp_path / 'shapes')}")
    (tmp_path / "file").touch()
    flags = ("--checkpoint", str(checkpoint), *sets, *QUICK, "--csv", str(tmp_path / "file" / "table.csv"))
    assert evaluate.main([*flags]) == 1
    captured = capsys.readouterr()
    assert "val/shapes-zeroshot-top1" in captured.out
    assert "table.csv cannot be written" in captured.err
    assert "Traceback" not in captured.err
