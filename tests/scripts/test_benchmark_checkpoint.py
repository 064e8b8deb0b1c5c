"""`scripts.benchmark_checkpoint`."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import benchmark_checkpoint


@pytest.mark.slow
def test_each_side_gets_a_row_and_nothing_stays_on_the_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_checkpoint.main(["--model", "tiny-test", "--folder", str(tmp_path), "--rounds", "2"]) == 0
    out = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")][2:]
    assert rows == [
        "plain copy before it",
        "first save, stall",
        "plain copy before that",
        "later save, stall",
        "raw write",
        "checkpoint, write",
    ]
    assert "39 MiB, 2 rounds" in out
    assert list(tmp_path.iterdir()) == []


def test_the_state_is_weights_and_two_moments() -> None:
    state = benchmark_checkpoint.build_state("tiny-test")
    assert len(state["optimizer.safetensors"]) == 2 * len(state["model.safetensors"])
    weights = sum(t.numel() * t.element_size() for t in state["model.safetensors"].values())
    assert benchmark_checkpoint.num_bytes(state) == 3 * weights


def test_the_raw_side_writes_the_same_bytes(tmp_path: Path) -> None:
    state = benchmark_checkpoint.build_state("tiny-test")
    benchmark_checkpoint.raw_write(state, tmp_path / "raw")
    written = sum(path.stat().st_size for path in (tmp_path / "raw").iterdir())
    assert written == benchmark_checkpoint.num_bytes(state)
