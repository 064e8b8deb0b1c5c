"""`scripts.demo`: interrupted it goes on, complete it says so and tells the same figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.demo_scenes import DemoSize, write_demo_data
from scripts import demo
from training.cli import parse_args

SMALL = [
    *("--model", "tiny-test", "--device", "cpu", "--batch-size", "32", "--workers", "0"),
    *("--epochs", "2", "--warmup", "2", "--progress", "lines"),
]


def test_the_recipe_is_what_the_trainer_understands() -> None:
    config = parse_args(["--config", str(demo.RECIPE)])
    assert config.run.resume == "latest"
    assert config.eval.zeroshot_data == ("demo=runs/demo-data/eval",)


def test_the_demo_goes_on_after_a_stop_and_does_not_start_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Six shards, as many as the demo's own.
    write_demo_data(tmp_path / "demo-data", 0, DemoSize(train=96, val=6, evaluation=20, shard=16, pixels=32))
    command = ["--runs", str(tmp_path), *SMALL]
    assert demo.main([*command, "--stop-after-steps", "2"]) == 75
    assert "The same command goes on from here" in capsys.readouterr().out
    assert demo.main(command) == 0
    first = capsys.readouterr()
    assert "step_000000002" in first.err
    assert "Zero-shot accuracy on held-out images: " in first.out
    assert f"Its curves: {tmp_path / 'demo' / 'curves.png'}" in first.out
    assert (tmp_path / "demo" / "curves.png").exists()
    assert demo.main(command) == 0
    second = capsys.readouterr()
    assert "the run is complete" in second.err
    assert second.out == first.out


def test_a_mistake_is_the_trainers_exit_code(tmp_path: Path) -> None:
    write_demo_data(tmp_path / "demo-data", 0, DemoSize(train=6, val=2, evaluation=2, shard=1, pixels=16))
    assert demo.main(["--runs", str(tmp_path), "--no-such-flag"]) == 2
