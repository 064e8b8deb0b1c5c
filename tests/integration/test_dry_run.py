"""`--dry-run`: what it tells of worlds that do not exist, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.shards import write_shards
from training.main import main

TINY = ["--model", "tiny-test", "--precision", "fp32", "--device", "cpu", "--batch-size", "8", "--dry-run"]


def _told(pattern: str, text: str) -> float:
    match = re.search(pattern, text)
    assert match, text
    return float(match[1].replace(",", ""))


def test_rank_0_of_a_large_world_is_built_and_steps_on_one_process_and_nothing_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--dry-run-world-size", "4096", "--train-num-samples", "1000000", "--accum-freq", "2", "--epochs", "2"]
    assert main([*TINY, *flags, "--warmup-samples", "131072", "--name", "x"]) == 0
    text = caplog.text
    assert "8 per rank x 2 accumulated x 4096 ranks = 65536 samples a step, 15 steps an epoch" in text
    assert "16 lanes a rank, 65536 in all" in text
    assert "in 2 steps (131072 samples)" in text and "AdamW" in text
    weights = _told(r"weights ([\d.,]+) MiB", text)
    assert _told(r"gradients ([\d.,]+) MiB", text) == pytest.approx(weights, abs=0.2)
    assert _told(r"optimiser ([\d.,]+) MiB", text) == pytest.approx(2 * weights, abs=0.2)
    loss, rest = _told(r"the loss may take ([\d.,]+) MiB", text), _told(r"for a moment ([\d.,]+) MiB", text)
    assert 24 <= loss <= rest
    # One synchronisation: the gradients once, and beside them the sums of the loss.
    assert _told(r"allreduce \d x, ([\d.,]+) MiB", text) == pytest.approx(weights + 1.0, abs=0.3)
    assert "nothing refused" in text
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_opens_the_data_that_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shards(tmp_path / "data", [16, 16])
    assert main([*TINY, "--train-data", str(tmp_path / "data")]) == 0
    assert "4 steps an epoch" in caplog.text and "webdataset, 2 shards" in caplog.text
    assert main([*TINY, "--train-data", str(tmp_path / "none" / "{0..3}.tar")]) == 2
    assert "none/0.tar" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        ([], ["--dry-run needs --train-data"]),
        (
            ["--train-num-samples", "99", "--no-gather-with-grad", "--ddp-static-graph", "--accum-freq", "2"],
            ["--no-gather-with-grad is refused", "--ddp-static-graph with --accum-freq > 1 is refused"],
        ),
        (["--train-num-samples", "99", "--dry-run-world-size", "64"], ["less than one global batch of 512"]),
        (["--train-num-samples", "99", "--report-to", "wandbb"], ["did you mean wandb"]),
    ],
)
def test_what_a_run_would_refuse_a_dry_run_refuses_with_all_reasons_on_one_line(
    flags: list[str], messages: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main([*TINY, *flags]) == 2
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1 and "\n" not in errors[0]
    assert all(message in errors[0] for message in messages)
