"""`scripts.watch_evaluate` on runs that have ended: what is measured, what is passed over, and its mistakes."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from scripts import evaluate, watch_evaluate
from tests.helpers.shards import write_shards
from tests.integration.test_training import run as train
from tests.training.evaluation.conftest import write_labelled
from tests.training.test_sinks import scalars
from training.evaluation import watch as watching
from training.metrics import read_records
from training.plots import read_run

QUICK = ("--device", "cpu", "--workers", "1", "--batch-size", "4", "--interval-s", "0.1")
NAMES = ["step_000000002", "step_000000004", "epoch_1"]
TOP1 = "val/shapes-zeroshot-top1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a labelled set, and logs/run: an epoch of 6 steps with averages, 3 checkpoints, no figures."""
    folder = tmp_path_factory.mktemp("watched")
    write_shards(folder / "shards", [48])
    write_labelled(folder / "shapes")
    flags = ("--epochs", "1", "--save-every-n-steps", "2", "--model-ema-samples", "16")
    assert train(folder / "logs", f"{folder}/shards/shard-00000.tar", *flags) == 0
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    """The run, in a folder of this test's own."""
    return Path(shutil.copytree(folder / "logs" / "run", tmp_path / "run"))


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def watch(run: Path | str, folder: Path, *flags: str) -> int:
    return watch_evaluate.main([str(run), "--zeroshot-data", f"shapes={folder / 'shapes'}", *QUICK, *flags])


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def measured(run: Path) -> list[str]:
    return [record["checkpoint"] for record in lines(run)]


def test_each_checkpoint_gets_the_figures_that_it_gets_alone(run: Path, folder: Path, tmp_path: Path) -> None:
    assert watch(run, folder, "--ema") == 0
    assert measured(run) == [name for name in NAMES for _ in range(2)]
    assert {path.name for path in run.iterdir()} >= {"evaluations.jsonl"}
    assert not (run / "evaluations.lock").exists()
    for averaged, record in zip((False, True), lines(run)[-2:], strict=True):
        sets = ("--zeroshot-data", f"shapes={folder / 'shapes'}", *QUICK[:-2], "--json", str(tmp_path / "alone"))
        alone = ["--checkpoint", str(run / "checkpoints" / "epoch_1"), *sets, *(["--ema"] if averaged else [])]
        assert evaluate.main(alone) == 0
        prefix = "val/ema/" if averaged else "val/"
        found = {name: value for name, value in record.items() if name.startswith("val/")}
        expected = json.loads((tmp_path / "alone").read_text())
        assert found == {name.replace("val/", prefix, 1): value for name, value in expected.items()}


def test_only_what_is_missing_is_measured_and_the_line_that_a_kill_tore_is_mended(run: Path, folder: Path) -> None:
    assert watch(run, folder) == 0
    path = run / "evaluations.jsonl"
    first, second, third = path.read_text().splitlines(keepends=True)
    path.write_text(first + third + second[: len(second) // 2])
    assert watch(run, folder) == 0
    assert measured(run) == [NAMES[0], NAMES[2], NAMES[1]]
    assert watch(run, folder) == 0
    assert len(lines(run)) == 3


def test_the_curves_of_the_run_hold_the_figures(run: Path, folder: Path) -> None:
    assert watch(run, folder) == 0
    curves = read_run(run).curves
    assert curves[TOP1] == ([16, 32, 48], [record[TOP1] for record in lines(run)])
    assert len(curves["train/loss"][0]) == 6


def test_a_damaged_checkpoint_is_named_and_passed_over(
    run: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = run / "checkpoints" / NAMES[1] / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert watch(run, folder, "--once") == 1
    assert measured(run) == [NAMES[0], NAMES[2]]
    assert f"{NAMES[1]} (step 4) is passed over: " in caplog.text and "model.safetensors is damaged" in caplog.text
    assert "1 of its checkpoints could not be evaluated as asked" in caplog.text


@pytest.mark.parametrize("gone", [NAMES[0], NAMES[1]])
def test_a_checkpoint_that_is_rotated_away_meanwhile_costs_one_line(
    run: Path, folder: Path, gone: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As the first one is read: itself, or the one after it."""
    load = watching.load_model

    def load_after_rotation(*args: Any) -> Any:
        shutil.rmtree(run / "checkpoints" / gone, ignore_errors=True)
        return load(*args)

    monkeypatch.setattr(watching, "load_model", load_after_rotation)
    assert watch(run, folder) == 0
    assert measured(run) == [name for name in NAMES if name != gone]
    assert caplog.text.count(f"{gone} (step {int(gone[-1])}) is no longer there: rotated away") == 1


def test_a_set_that_cannot_be_read_is_tried_again_and_does_not_cost_the_others(
    run: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = write_labelled(tmp_path / "broken", broken=10)
    sets = ("--zeroshot-data", f"broken={broken}", f"shapes={folder / 'shapes'}", "--epochs-only")
    assert watch_evaluate.main([str(run), *sets, *QUICK]) == 1
    assert [(record["checkpoint"], record["set"]) for record in lines(run)] == [("epoch_1", "shapes")]
    assert caplog.text.count("broken is left out of this evaluation") == 3


def test_a_run_that_cannot_be_written_has_its_curves_elsewhere(run: Path, folder: Path, tmp_path: Path) -> None:
    before = sorted(run.rglob("*"))
    output = tmp_path / "figures"
    assert watch(run, folder, "--output", str(output), "--epochs-only", "--report-to", "tensorboard") == 0
    assert sorted(run.rglob("*")) == before
    assert measured(output) == ["epoch_1"]
    assert (output / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    assert {"train/loss", TOP1} <= {name for record in read_records(output) for name in record}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tensorboard_gets_a_folder_of_its_own_beside_the_trainers(run: Path, folder: Path) -> None:
    assert watch(run, folder, "--report-to", "tensorboard", "--every", "4") == 0
    (run / "evaluations.jsonl").write_text("")
    assert watch(run, folder, "--report-to", "tensorboard", "--every", "9") == 0
    values = {record["step"]: round(record[TOP1], 4) for record in lines(run)}
    (again,) = values.values()
    points = scalars(run / "tensorboard" / "evaluations", TOP1)
    assert [step for step, _ in points] == [4, 6, 6] and points[-1] == (6, again)


def test_a_run_that_has_not_begun_is_waited_for_until_it_is_idle(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert watch(tmp_path / "later", folder, "--idle-minutes", "0.005") == 0
    assert "waiting for the run later to begin" in caplog.text and "nothing to evaluate" in caplog.text
    assert not (tmp_path / "later").exists()


def test_a_run_that_goes_on_is_waited_for_until_it_is_idle(
    run: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(run / "checkpoints" / "epoch_1")
    assert watch(run, folder, "--idle-minutes", "0.005") == 0
    assert measured(run) == NAMES[:2]
    assert "no new checkpoint has come for long" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("{run}",), "nothing to evaluate: give --zeroshot-data"),
        (("{run}", "--zeroshot-data", "a=nowhere"), "there is no folder nowhere"),
        (("{run}", "--val-data", "{shards}", "--report-to", "wandbb"), "did you mean wandb?"),
        (("{run}", "--val-data", "{shards}", "--every", "0"), "--every must be positive, got 0"),
        (("{run}", "--val-data", "{shards}", "--output", "{run}"), "is the folder of a run: leave it out"),
        (("s3://bucket/run", "--val-data", "{shards}"), "is a URL: --output must name a local folder"),
        (("{run}-", "--val-data", "{shards}", "--once"), "there is no such folder; RUN is <logs>/<name>"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2_before_any_work(
    run: Path, folder: Path, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [flag.format(run=run, shards=f"{folder}/shards/shard-00000.tar") for flag in flags]
    assert watch_evaluate.main([*named, *QUICK]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") and message in error
    assert not (run / "evaluations.jsonl").exists()


def test_averages_that_were_not_saved_are_an_error_of_the_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--epochs", "1", "--stop-after-steps", "1")
    assert train(tmp_path, f"{folder}/shards/shard-00000.tar", *flags) == 75
    assert watch(tmp_path / "run", folder, "--ema", "--once") == 2
    assert "has no ema.safetensors; a run with --model-ema-samples saves one" in capsys.readouterr().err
