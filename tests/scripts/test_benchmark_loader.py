"""The loader benchmark runs and prints its tables; its figures are nobody's test."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import benchmark_loader
from scripts.benchmark_pictures import PictureKind, photo_jpeg


@pytest.mark.slow
def test_it_compares_what_it_can_and_says_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "loader.md"
    short = ["--short-sides=384", "--rounds=1", "--samples=64", "--warmup=64", "--per-shard=12", f"--out={out}"]
    assert benchmark_loader.main(short) == 0
    text = capsys.readouterr().out
    assert text.strip() == out.read_text().strip()
    assert "OpenCLIP's side is left out: no --openclip-python" in text
    for table in ("Whole loader", "outside JPEG decode and crop-and-resize", "Reading tars"):
        assert table in text
    assert text.count("| 384 px, q90, 50 KiB |") == 3


def test_pictures_have_the_file_size_that_is_asked_for() -> None:
    kind = PictureKind(short=200, quality=90, kib=14)
    assert 13 * 1024 < len(photo_jpeg(kind, 0)) <= 14 * 1024
    assert photo_jpeg(kind, 1) != photo_jpeg(kind, 0)
