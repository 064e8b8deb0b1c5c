from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training.metrics import MetricsLog, read_metrics, read_records


def fill(run_dir: Path, steps: list[int], resume_step: int | None = None) -> Path:
    with MetricsLog(run_dir, resume_step) as log:
        for step in steps:
            log.write({"train/loss": 1 / (step + 1)}, step=step, epoch=step // 10, samples_seen=step * 32)
        return log.path


def steps_of(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def test_every_line_is_an_object_with_step_epoch_samples_and_time(tmp_path: Path) -> None:
    lines = fill(tmp_path / "new", [1, 2, 25]).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["step"], r["epoch"], r["samples_seen"]) for r in records] == [(1, 0, 32), (2, 0, 64), (25, 2, 800)]
    assert all(r["time"] > 1e9 and r["train/loss"] > 0 for r in records)


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, None) as log:
        log.write({"a": 1}, step=1, epoch=0, samples_seen=1)
        assert steps_of(log.path) == [1]


def test_a_resume_cuts_off_what_lies_beyond_its_step(tmp_path: Path) -> None:
    fill(tmp_path, [10, 20, 30, 40])
    path = fill(tmp_path, [30, 40], resume_step=20)
    assert steps_of(path) == [10, 20, 30, 40]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_evaluation_at_the_step_of_the_checkpoint_stays(tmp_path: Path) -> None:
    fill(tmp_path, [20, 20, 21])
    assert steps_of(fill(tmp_path, [], resume_step=20)) == [20, 20]


def test_a_run_that_begins_anew_begins_an_empty_file(tmp_path: Path) -> None:
    fill(tmp_path, [0, 10])
    assert steps_of(fill(tmp_path, [0], resume_step=None)) == [0]


def test_a_torn_line_is_passed_over_and_cut_off_on_resume(tmp_path: Path) -> None:
    path = fill(tmp_path, [10, 20])
    with path.open("a") as file:
        file.write('{"step": 30, "epo')
    assert steps_of(path) == [10, 20]
    assert steps_of(fill(tmp_path, [30], resume_step=20)) == [10, 20, 30]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_numbers_of_tensors_and_arrays_become_plain_numbers(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, None) as log:
        values = {"a": torch.tensor(0.5), "b": np.float32(0.25), "c": np.int64(3), "d": True, "e": "text"}
        record = log.write(values, step=1, epoch=0, samples_seen=1)
    assert [record[name] for name in "abcde"] == [0.5, 0.25, 3, True, "text"]
    assert next(read_metrics(log.path)) == record


def test_what_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, None) as log:
        log.write({"x": math.nan, "y": torch.tensor(math.inf), "z": 1.0}, step=1, epoch=0, samples_seen=1)
    assert "NaN" not in log.path.read_text() and "Infinity" not in log.path.read_text()
    record = next(read_metrics(log.path))
    assert record["x"] is None and record["y"] is None and record["z"] == 1.0
    assert record["nonfinite"] == ["x", "y"]


def test_the_listener_gets_every_record(tmp_path: Path) -> None:
    records: list[Any] = []

    class Listener:
        def write(self, record: Any) -> None:
            records.append(record)

    with MetricsLog(tmp_path, None, Listener()) as log:
        log.write({"a": 1}, step=3, epoch=0, samples_seen=9)
    assert [record["step"] for record in records] == [3]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_names_the_file_and_closing_stays_quiet(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, None) as log:
        log._file.close()
        log._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
        with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
            log.write({}, step=1, epoch=0, samples_seen=1)


def test_a_run_that_goes_back_has_each_step_once_and_in_order(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, None) as log:
        for step in (1, 2, 3, 2, 3):
            if step == 2 and log.path.read_text().count("\n") == 3:
                log.rewind(1)
            log.write({"a": step}, step=step, epoch=0, samples_seen=step)
    assert [record["step"] for record in read_metrics(log.path)] == [1, 2, 3]


# ---- with evaluations beside the training


def beside(folder: Path, *records: dict[str, Any]) -> None:
    """evaluations.jsonl, of checkpoints saved at the time of their step."""
    usual = [{"saved_at": float(record["step"])} | record for record in records]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in usual))


def trained(folder: Path, *records: dict[str, Any]) -> None:
    """metrics.jsonl, each line written at the time of its step."""
    usual = [{"time": float(record["step"])} | record for record in records]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in usual))


def figures(folder: Path) -> list[tuple[int, str, float]]:
    return [
        (record["step"], name, value)
        for record in read_records(folder)
        for name, value in record.items()
        if name.startswith(("val/", "train/"))
    ]


def test_evaluations_join_the_records_of_training_by_step(tmp_path: Path) -> None:
    trained(tmp_path, *({"step": step, "train/loss": 1.0} for step in (1, 2, 3)))
    beside(tmp_path, {"step": 1, "val/a": 0.1}, {"step": 3, "val/a": 0.3})
    expected = [(1, "train/loss", 1.0), (1, "val/a", 0.1), (2, "train/loss", 1.0)]
    assert figures(tmp_path) == [*expected, (3, "train/loss", 1.0), (3, "val/a", 0.3)]


def test_either_file_may_be_missing(tmp_path: Path) -> None:
    assert read_records(tmp_path) == []
    beside(tmp_path, {"step": 1, "val/a": 0.1})
    assert figures(tmp_path) == [(1, "val/a", 0.1)]
    (tmp_path / "evaluations.jsonl").unlink()
    trained(tmp_path, {"step": 1, "train/loss": 1.0})
    assert figures(tmp_path) == [(1, "train/loss", 1.0)]


def test_a_figure_that_the_trainer_has_measured_itself_counts_and_the_others_stay(tmp_path: Path) -> None:
    trained(tmp_path, {"step": 2, "val/a": 0.5})
    beside(tmp_path, {"step": 2, "val/a": 0.4, "val/b": 0.6}, {"step": 2, "val/a": 0.3})
    assert figures(tmp_path) == [(2, "val/a", 0.5), (2, "val/b", 0.6)]


def test_of_two_checkpoints_of_a_step_the_figures_of_the_later_one_count(tmp_path: Path) -> None:
    later, earlier = {"step": 2, "val/a": 0.2, "saved_at": 9.0}, {"step": 2, "val/a": 0.1, "saved_at": 5.0}
    for order in ((later, earlier), (earlier, later)):
        beside(tmp_path, *order)
        assert figures(tmp_path) == [(2, "val/a", 0.2)]


def test_measured_twice_the_second_time_counts(tmp_path: Path) -> None:
    beside(tmp_path, {"step": 2, "val/a": 0.1}, {"step": 2, "val/a": 0.2})
    assert figures(tmp_path) == [(2, "val/a", 0.2)]


def test_figures_of_a_future_that_the_trainer_went_back_behind_are_left_out(tmp_path: Path) -> None:
    beside(tmp_path, *({"step": step, "val/a": step / 10, "saved_at": 100.0 + step} for step in (2, 4, 6)))
    trained(tmp_path, {"step": 1, "time": 101.0}, {"step": 2, "time": 102.0}, {"step": 3, "time": 200.0})
    assert figures(tmp_path) == [(2, "val/a", 0.2)]


def test_a_trainer_that_goes_on_behind_its_checkpoint_leaves_its_figures_alone(tmp_path: Path) -> None:
    beside(tmp_path, {"step": 2, "val/a": 0.2, "saved_at": 102.5})
    trained(tmp_path, {"step": 1, "time": 101.0}, {"step": 2, "time": 102.0}, {"step": 3, "time": 102.4})
    assert figures(tmp_path) == [(2, "val/a", 0.2)]
