"""`scripts.report_run`."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import report_run
from tests.training.test_plots import write_run


def test_a_run_that_has_only_numbers_becomes_a_page_that_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", steps=4)
    assert report_run.main([str(run), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "No examples: --config" in page and "no config.yaml" in page and "No step has been recorded yet" in page
    assert [path.name for path in run.iterdir() if path.suffix == ".tmp"] == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "is not a run folder: it has no metrics.jsonl"),
        (["other", "--checkpoint", "x"], "--checkpoint is one run's; several take their newest"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert report_run.main([str(tmp_path), *flags, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_negative_number_of_examples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as refused:
        report_run.main([str(tmp_path), "--num-examples", "-1"])
    assert refused.value.code == 2
