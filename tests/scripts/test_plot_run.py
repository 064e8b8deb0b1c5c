"""`scripts.plot_run`."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import plot_run
from tests.training.test_plots import write_run


def test_the_picture_goes_into_the_first_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", steps=4)
    assert plot_run.main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "curves.png")
    assert (run / "curves.png").exists()


def test_a_wrong_folder_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plot_run.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} is not a run folder: it has no metrics.jsonl\n"
