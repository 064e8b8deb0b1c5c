"""What a run folder says of its run, in every state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from training.config import OptimConfig
from training.errors import ConfigError
from training.plan import make_plan
from training.run_report.history import History, measured, read_history

LOG = "2026-01-02 03:04:05,678 {level} training.run: {text}\n"


def write_folder(folder: Path, *records: dict[str, Any], log: str = "", settings: str = "lr: 0.001\n") -> Path:
    """A run folder with these files."""
    folder.mkdir(parents=True)
    common = {"epoch": 0, "samples_seen": 0, "time": 1000.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(common | record) + "\n" for record in records))
    (folder / "config.yaml").write_text(settings)
    (folder / "train.log").write_text(log)
    return folder


def _history(folder: Path, text: str, level: str = "INFO") -> History:
    return read_history(write_folder(folder, {"step": 3, "train/loss": 1.0}, log=LOG.format(level=level, text=text)))


@pytest.mark.parametrize(
    ("level", "text", "state"),
    [
        ("INFO", "done", "complete"),
        ("INFO", "done; not brought to s3://b: epoch_2", "complete"),
        ("INFO", "the run is complete: nothing to do", "complete"),
        ("INFO", "stopped (signal SIGTERM), everything is saved", "stopped"),
        ("ERROR", "DataError: too many samples cannot be used", "stopped"),
        ("INFO", "step 3/10", "running"),
    ],
)
def test_the_state_follows_the_last_line_of_the_log(tmp_path: Path, level: str, text: str, state: str) -> None:
    assert _history(tmp_path / "run", text, level).state() == state


def test_a_run_that_is_silent_for_long_has_stopped(tmp_path: Path) -> None:
    history = _history(tmp_path / "run", "step 3/10")
    assert history.state(history.written_at + 500) == "running"
    assert history.state(history.written_at + 700) == "stopped"


def test_long_pauses_between_records_are_waited_for(tmp_path: Path) -> None:
    records = [{"step": step, "time": 3600.0 * step, "train/loss": 1.0} for step in (1, 2)]
    history = read_history(write_folder(tmp_path / "run", *records))
    assert history.state(history.written_at + 7200) == "running"


def test_the_total_is_that_of_the_last_plan_in_the_log(tmp_path: Path) -> None:
    plans = [make_plan(OptimConfig(batch_size=8, epochs=epochs), 80, 2) for epochs in (1, 3)]
    log = "".join(
        LOG.format(level="INFO", text=f"plan: {plan}").replace("training.run", "training.facts") for plan in plans
    )
    history = read_history(write_folder(tmp_path / "run", {"step": 1, "train/loss": 1.0}, log=log))
    assert history.total_steps == plans[1].total_steps == 15


def test_secrets_are_masked_though_the_files_hold_them(tmp_path: Path) -> None:
    secret = "https://me:open-sesame@host/a.tar"
    log = LOG.format(level="INFO", text=f"reading {secret}")
    history = read_history(write_folder(tmp_path / "run", {"step": 1}, log=log, settings=f"train_data: {secret}\n"))
    assert "open-sesame" not in repr(history) and "host/a.tar" in history.settings["train_data"]


def test_figures_have_their_last_and_their_best_value() -> None:
    losses, accuracies = (3.0, 1.0, 2.0), (0.1, 0.3, 0.2)
    records = [
        {"samples_seen": index, "val/clip_val_loss": loss, "val/a-zeroshot-top1": top1, "val/num_samples": 5.0}
        for index, (loss, top1) in enumerate(zip(losses, accuracies, strict=True))
    ]
    accuracy, loss = measured(records)
    assert (accuracy.name, accuracy.last, accuracy.best) == ("val/a-zeroshot-top1", (2, 0.2), (1, 0.3))
    assert (loss.last, loss.best, loss.num_evaluations) == ((2, 2.0), (1, 1.0), 3)


def test_a_folder_without_metrics_or_with_broken_settings_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run folder: it has no metrics.jsonl"):
        read_history(tmp_path)
    with pytest.raises(ConfigError, match="holds no metrics yet"):
        read_history(write_folder(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"config\.yaml: expected a mapping"):
        read_history(write_folder(tmp_path / "list", {"step": 1}, settings="- 1\n"))
