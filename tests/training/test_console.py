from __future__ import annotations

import logging
import re
import time
import warnings
from pathlib import Path

import pytest

from training.console import Console, describe, format_duration, logging_to

VALUES = {"train/loss": 3.14159, "train/samples_per_second": 1234.5, "train/data_time": 0.1, "train/batch_time": 0.4}


# ---- log lines


def test_the_main_rank_writes_plain_lines_and_a_file_with_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_to(tmp_path / "run"):
        logging.getLogger("data.anything").info("hello")
        logging.getLogger("some.library").info("not shown")
        logging.getLogger("talkative").setLevel(logging.DEBUG)
        logging.getLogger("talkative").info("not shown either")
        logging.getLogger("some.library").warning("careful")
    assert capsys.readouterr().err == "hello\ncareful\n"
    lines = (tmp_path / "run" / "train.log").read_text().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("20") and lines[0].endswith("INFO data.anything: hello")


def test_other_ranks_show_warnings_with_their_number_and_write_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_to(tmp_path, rank=3):
        logging.getLogger("training.x").info("hello")
        logging.getLogger("training.x").warning("trouble")
    assert capsys.readouterr().err == "[rank 3] trouble\n"
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_adds_to_its_log(tmp_path: Path) -> None:
    for _ in range(2):
        with logging_to(tmp_path):
            logging.getLogger("training").info("started")
    assert (tmp_path / "train.log").read_text().count("started") == 2


def test_secrets_are_masked_in_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to(tmp_path):
        logging.getLogger("data").warning("cannot read %s", "https://me:pass@host/x.tar")
    assert "pass@" not in capsys.readouterr().err + (tmp_path / "train.log").read_text()


def test_warnings_of_python_become_log_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with logging_to(tmp_path):
            warnings.warn("old way", UserWarning, stacklevel=1)
    assert "UserWarning: old way" in capsys.readouterr().err
    assert "UserWarning: old way" in (tmp_path / "train.log").read_text()


def test_logging_is_put_back_as_it_was(tmp_path: Path) -> None:
    before = list(logging.getLogger().handlers), logging.getLogger("training").level
    with logging_to(tmp_path):
        assert logging.getLogger().handlers != before[0]
    assert (list(logging.getLogger().handlers), logging.getLogger("training").level) == before


# ---- progress


def test_lines_show_loss_speed_wait_and_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to(tmp_path), Console("lines", total_steps=2000, start_step=100) as console:
        console.step(101)
        console.step(200, VALUES)
    out = capsys.readouterr().err
    assert out.startswith("step 200/2,000 (10%), loss 3.1416, 1,234 samples/s, data wait 25%, 0:0")
    assert out.endswith(" left\n") and out.count("\n") == 1
    assert "step 200/2,000" in (tmp_path / "train.log").read_text()


def test_without_a_terminal_auto_means_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to(tmp_path), Console("auto", total_steps=10) as console:
        console.step(1, VALUES)
    assert capsys.readouterr().err.startswith("step 1/10")


def test_lines_do_not_break_the_bar_and_steps_go_to_the_log_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_to(tmp_path), Console("bar", total_steps=10, start_step=4) as console:
        console.step(5, VALUES)
        console.line("saved")
        console.step(10, VALUES)
    out = capsys.readouterr().err
    assert "step 5/10" not in out
    assert "10/10" in out and "loss 3.1416" in out
    # A line starts where a bar was wiped, and the bar is drawn anew after it.
    assert "\rsaved\n" in out.replace(" ", "")
    assert (tmp_path / "train.log").read_text().count("step ") == 2


def test_other_ranks_show_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to(None, rank=1), Console("bar", total_steps=10, is_main=False) as console:
        console.step(1, VALUES)
        console.line("saved")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, ""),
        ({"train/samples_per_second": 3.21}, "3.2 samples/s"),
        ({"train/loss": 2, "train/data_time": 1.0, "train/batch_time": 0.0}, "loss 2.0000"),
    ],
)
def test_a_line_says_what_is_known(values: dict[str, float], text: str) -> None:
    assert describe(values) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3723, "1:02:03"), (90000, "25:00:00")])
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_time_left_counts_a_pause_neither_for_the_steps_around_it_nor_as_the_last_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with logging_to(None), Console("lines", total_steps=1000) as console:
        now[0] += 3600
        console.paused(0, 3600)  # before the first step: comes once
        for step in range(100, 501, 100):
            now[0] += 100
            if step == 300:
                now[0] += 50
                console.paused(250, 50)
            console.step(step, VALUES)
    left = [line.split(", ")[-1] for line in capsys.readouterr().err.splitlines()]
    # A second a step; from the pause on a fifth of one more.
    assert left == ["15:00 left", "13:20 left", "14:00 left", "12:00 left", "10:00 left"]


def test_a_bar_goes_on_at_its_pace_after_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with logging_to(tmp_path), Console("bar", total_steps=100) as console:
        for step in range(1, 11):
            now[0] += 0.5
            if step == 9:
                now[0] += 600
                console.paused(8, 600)
                console.line("figures")
            console.step(step)
        shown = capsys.readouterr().err
    assert "\rfigures\n" in shown.replace(" ", "")
    assert " 10/100 [10:05<00:45,  2.00step/s" in shown
    assert set(re.findall(r"[\d.]+s(?:tep)?/s(?:tep)?", shown)) == {"2.00step/s"}
