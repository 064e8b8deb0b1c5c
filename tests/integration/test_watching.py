"""Evaluation beside training, in real processes: killed, stopped, on several ranks, from a bucket, into trackers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import watch_evaluate
from tests.helpers.gloo import run_ranks
from tests.helpers.process import Running, start_training
from tests.helpers.s3 import S3Server
from tests.helpers.shards import write_shards
from tests.integration.test_training import TINY
from tests.integration.test_training import run as train
from tests.training.evaluation.conftest import write_labelled
from training.evaluation import tasks, watch
from training.metrics import read_records
from training.remote import Remote

WATCH = ("--device", "cpu", "--workers", "1", "--batch-size", "4", "--interval-s", "0.2")
SAVE = ("--epochs", "1", "--save-every-n-steps", "2", "--keep-last", "100")
TOP1, RECALL = "val/shapes-zeroshot-top1", "val/image_to_text_R@1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 48 samples, which are 6 steps an epoch, and two sets."""
    folder = tmp_path_factory.mktemp("watching")
    write_shards(folder / "shards", [48])
    write_labelled(folder / "shapes")
    write_shards(folder / "pairs", [7, 3])
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints at 2, 4 and 6."""
    logs = tmp_path_factory.mktemp("whole")
    assert train(logs, data_of(folder), *SAVE) == 0
    return logs / "run"


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """That run, in a folder of this test's own."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def data_of(folder: Path) -> str:
    return f"{folder}/shards/shard-00000.tar"


def flags(run: Path | str, folder: Path, *more: str) -> list[str]:
    return [str(run), "--zeroshot-data", f"shapes={folder}/shapes", "--val-data", f"{folder}/pairs", *WATCH, *more]


def start(run: Path, folder: Path, *more: str) -> Running:
    return Running([sys.executable, "-m", "scripts.watch_evaluate", *flags(run, folder, *more)])


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def figures(run: Path) -> dict[tuple[int, str], float]:
    """By step and name; fails where one is there twice."""
    found = [(record["step"], name, record[name]) for record in lines(run) for name in record if name[:4] == "val/"]
    by_name = {(step, name): value for step, name, value in found}
    assert len(by_name) == len(found)
    return by_name


@pytest.fixture(scope="module")
def expected(whole: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], float]:
    """What one process measures that nobody disturbs."""
    output = tmp_path_factory.mktemp("expected")
    assert watch_evaluate.main(flags(whole, folder, "--output", str(output))) == 0
    found = figures(output)
    assert {step for step, _ in found} == {2, 4, 6} and {name for _, name in found} >= {TOP1, RECALL}
    return found


Scratch = Callable[[Path], list[set[str]]]


@pytest.fixture
def scratch_seen(monkeypatch: pytest.MonkeyPatch) -> Scratch:
    """What lies in a scratch folder whenever a model is loaded from there."""

    def observe(scratch: Path) -> list[set[str]]:
        seen: list[set[str]] = []
        load = watch.load_model

        def noting(*args: Any) -> Any:
            seen.append({path.name for path in scratch.rglob("*") if path.is_file()})
            return load(*args)

        monkeypatch.setattr(watch, "load_model", noting)
        return seen

    return observe


@pytest.mark.slow
def test_beside_a_trainer_and_killed_in_between_each_figure_is_measured_once(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs, run = tmp_path / "logs", tmp_path / "logs" / "run"
    last, aside = run / "checkpoints" / "epoch_2", tmp_path / "aside"
    training = [*TINY, "--train-data", data_of(folder), "--logs", str(logs), "--name", "run", *SAVE, "--epochs", "2"]
    with start(run, folder) as first, start_training(*training) as trainer:
        first.wait_for(rf"^step_000000002 .*{TOP1}")
        first.kill()  # with a set of that checkpoint measured, and one not
        assert len(lines(run)) >= 1
        trainer.finish().expect(0)
    last.rename(aside)
    with start(run, folder) as second:
        second.wait_for("waiting for checkpoints of run")
        assert watch_evaluate.main(flags(run, folder)) == 2
        assert "evaluates this run already" in capsys.readouterr().err
        second.signal(signal.SIGTERM)
        assert "stopped (signal SIGTERM)" in second.finish().expect(75).output
    aside.rename(last)
    assert watch_evaluate.main(flags(run, folder)) == 0
    found = figures(run)
    assert len(lines(run)) == 2 * 6
    curves = [(record["step"], record[TOP1]) for record in read_records(run) if TOP1 in record]
    assert curves == [(step, found[step, TOP1]) for step in (2, 4, 6, 8, 10, 12)]
    assert "val/" not in (run / "metrics.jsonl").read_text()
    assert not (run / "evaluations.lock").exists()


def watch_on_rank(arguments: list[str], stop_rank: int) -> int:
    """The exit code on this rank; `stop_rank` gets a signal as its second set of pairs is measured."""
    torch.set_num_threads(1)
    calls, retrieval = [], tasks.retrieval

    def signalled(*args: Any) -> dict[str, float]:
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGUSR2)
        return retrieval(*args)

    if int(os.environ["RANK"]) == stop_rank:
        tasks.retrieval = signalled  # type: ignore[assignment]
    return watch_evaluate.main(arguments)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_another_number_of_ranks_goes_on(
    run: Path, folder: Path, expected: dict[tuple[int, str], float]
) -> None:
    assert run_ranks(watch_on_rank, 2, flags(run, folder), 1, timeout_s=120) == [75, 75]
    assert [(record["step"], record["set"]) for record in lines(run)] == [(2, "shapes"), (2, "val"), (4, "shapes")]
    assert watch_evaluate.main(flags(run, folder)) == 0
    assert figures(run) == expected


@pytest.mark.slow
def test_several_ranks_share_what_is_fetched_and_measure_what_one_does(
    run: Path, folder: Path, expected: dict[tuple[int, str], float], tmp_path: Path
) -> None:
    where = ("--output", str(tmp_path / "figures"), "--scratch", str(tmp_path / "scratch"))
    assert run_ranks(watch_on_rank, 2, flags(run.as_uri(), folder, *where), -1, timeout_s=120) == [0, 0]
    assert figures(tmp_path / "figures") == expected


def test_a_signal_inside_a_set_leaves_nothing_of_it_and_the_next_start_goes_on(
    run: Path, folder: Path, expected: dict[tuple[int, str], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    retrieval = tasks.retrieval

    def signalled(*args: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return retrieval(*args)

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "retrieval", signalled)
        assert watch_evaluate.main(flags(run, folder)) == 75
    assert [(record["step"], record["set"]) for record in lines(run)] == [(2, "shapes")]
    assert watch_evaluate.main(flags(run, folder)) == 0
    assert figures(run) == expected


def test_steps_that_a_trainer_makes_anew_are_measured_anew_and_count(folder: Path, tmp_path: Path) -> None:
    assert train(tmp_path, data_of(folder), *SAVE) == 0
    run = tmp_path / "run"
    assert watch_evaluate.main(flags(run, folder)) == 0
    again = ("--resume", "step_000000002", "--lr", "1e-2")
    for name in ("step_000000004", "epoch_1"):
        shutil.rmtree(run / "checkpoints" / name)
    assert train(tmp_path, data_of(folder), *SAVE, *again, "--stop-after-steps", "4") == 75
    before = {record["step"]: record for record in read_records(run) if RECALL in record}
    assert set(before) == {2}, "what was measured of the lost steps is no part of the curves"
    assert watch_evaluate.main(flags(run, folder, "--once")) == 0
    after = {record["step"]: record for record in read_records(run) if "val/clip_val_loss" in record}
    assert set(after) == {2, 4}
    losses = [record["val/clip_val_loss"] for record in lines(run) if record["step"] == 4 and record["set"] == "val"]
    assert len(losses) == 2 and losses[0] != losses[1] == after[4]["val/clip_val_loss"]


def test_a_run_in_a_bucket_is_fetched_one_checkpoint_at_a_time_without_what_is_not_needed(
    folder: Path, tmp_path: Path, s3_server: S3Server, expected: dict[tuple[int, str], float], scratch_seen: Scratch
) -> None:
    url = s3_server.url("watched")
    assert train(tmp_path, data_of(folder), *SAVE, "--remote-sync", url) == 0
    output, scratch = tmp_path / "figures", tmp_path / "scratch"
    seen = scratch_seen(scratch)
    where = ("--output", str(output), "--scratch", str(scratch))
    assert watch_evaluate.main(flags(f"{url}/run", folder, *where)) == 0
    there = {name for name, text in Remote(f"{url}/run").manifests().items() if text}
    assert there and {record["checkpoint"] for record in lines(output)} == there
    steps = {record["step"] for record in lines(output)}
    assert figures(output) == {key: value for key, value in expected.items() if key[0] in steps}
    wanted = {"model.safetensors", "model_config.json", "state.json", "manifest.json"}
    assert seen == [wanted] * len(there)
    assert list(scratch.iterdir()) == []
    assert (output / "metrics.jsonl").read_bytes() == (tmp_path / "run" / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_wandb_gets_the_figures_in_the_run_of_the_trainer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert train(tmp_path, data_of(folder), *SAVE, "--report-to", "wandb") == 0
    run = tmp_path / "run"
    assert watch_evaluate.main(flags(run, folder, "--epochs-only", "--report-to", "wandb")) == 0
    (own,) = run.glob("wandb/offline-run-*/*.wandb")
    (ours,) = run.glob("evaluations/wandb/offline-run-*/*.wandb")
    assert own.name == ours.name
    deadline = time.monotonic() + 20
    while TOP1.encode() not in ours.read_bytes():  # W&B's own process writes the file
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert b"saved_at" not in ours.read_bytes() and TOP1.encode() not in own.read_bytes()
    assert "dropped" not in caplog.text
