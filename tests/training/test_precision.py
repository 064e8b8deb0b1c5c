"""The loss scale of fp16: what it does at an overflow, over time, and through a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from training.main import main
from training.precision import LossScale, autocast_dtype, build_loss_scale

CPU = torch.device("cpu")
YES, NO = torch.tensor(True), torch.tensor(False)


def scale_at(value: float, calm_steps: float = 0) -> LossScale:
    scale = LossScale(CPU)
    scale.load_state_dict({"scale": value, "calm_steps": calm_steps})
    return scale


def test_an_overflow_halves_the_scale_and_a_long_calm_doubles_it_as_torchs_own_does() -> None:
    ours, theirs = LossScale(CPU), torch.amp.GradScaler("cpu", growth_interval=2000)
    theirs.scale(torch.zeros(()))
    found = torch.zeros(())
    for step in range(4500):
        overflowed = step in (0, 1, 700)
        ours.update(YES if overflowed else NO)
        torch._amp_update_scale_(theirs._scale, theirs._growth_tracker, found.fill_(overflowed), 2.0, 0.5, 2000)
        assert float(ours.value) == theirs.get_scale(), step


def test_the_scale_never_falls_below_one_and_then_says_so() -> None:
    scale = scale_at(2)
    assert bool(scale.may_shrink())
    scale.update(YES)
    assert float(scale.value) == 1 and not bool(scale.may_shrink())
    scale.update(YES)
    assert float(scale.value) == 1


def test_its_state_goes_through_json_bit_for_bit() -> None:
    scale = scale_at(2.0**24, 1999)
    again = LossScale(CPU)
    again.load_state_dict(json.loads(json.dumps(scale.state_dict())))
    for each in (scale, again):
        each.update(NO)
    assert again.state_dict() == scale.state_dict() == {"scale": 2.0**25, "calm_steps": 0.0}


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("amp", torch.float16), ("amp_bf16", torch.bfloat16), ("amp_bfloat16", torch.bfloat16), ("fp32", None)],
)
def test_only_fp16_has_a_loss_scale(precision: str, dtype: torch.dtype | None) -> None:
    assert autocast_dtype(precision) is dtype
    assert (build_loss_scale(precision, CPU) is not None) == (dtype is torch.float16)


def test_a_run_in_fp16_finds_its_scale_and_a_resume_goes_on_with_it(tmp_path: Path) -> None:
    def run(name: str, *flags: str) -> list[float]:
        data = ["--dataset-type", "synthetic", "--train-num-samples", "32", "--batch-size", "8", "--workers", "0"]
        model = ["--model", "tiny-test", "--precision", "amp", "--device", "cpu", "--log-every-n-steps", "1"]
        main([*data, *model, "--epochs", "2", "--warmup", "1", "--name", name, "--logs", str(tmp_path), *flags])
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [record["train/loss"] for record in map(json.loads, lines)]

    def scale(name: str, checkpoint: str) -> dict[str, float]:
        return json.loads((tmp_path / name / "checkpoints" / checkpoint / "state.json").read_text())["loss_scale"]

    whole = run("whole")
    run("parts", "--stop-after-steps", "3")
    assert run("parts", "--resume", "latest") == whole
    assert scale("parts", "epoch_2") == scale("whole", "epoch_2")
