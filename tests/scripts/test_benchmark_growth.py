"""`scripts.benchmark_growth`."""

from __future__ import annotations

import pytest

from scripts import benchmark_growth


@pytest.mark.slow
def test_each_world_gets_a_row_and_only_what_is_gathered_grows(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_growth.main(["--real", "2", "--fake", "2", "16"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    names = [cell.strip() for cell in lines[0].split("|")[2:-1]]
    rows = [
        dict(zip(names, (float(cell.replace(",", "")) for cell in line.split("|")[2:-1]), strict=True))
        for line in lines[2:]
    ]
    assert [row["lanes"] for row in rows] == [128, 128, 1024]
    # Real or pretended, rank 0 holds and moves the same.
    for name in ("loss MiB", "moved MiB", "position MiB"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=0.05)
    assert rows[2]["moved MiB"] == pytest.approx(8 * rows[1]["moved MiB"], rel=0.05)
